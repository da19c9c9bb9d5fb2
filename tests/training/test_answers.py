"""Answers while a run trains: training doesn't notice them, they are those of its weights, and none of them ends it."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from runfiles import final_files, rows
from running import Sft
from sft.evaluation import scorers
from sft.runs import answers_file
from sft.runs.answers_file import Answer
from sft.training import answers

ON = ("evaluation.samples=4", "evaluation.max_new_tokens=12", "evaluation.seconds=200")
SETTINGS = ("epochs=2", "val_every=2", "export=false")
NOISE = ("model.neftune_alpha=5", "model.config.attention_dropout=0.1")
MADE: Answer = {
    "step": 3,
    "number": 0,
    "source": "rows.jsonl",
    "row": 7,
    "prompt": "Say a.",
    "reference": "aa",
    "base": "b\x1b[2J",
    "answer": "aa ",
    "score": 0.75,
    "base_score": 0.25,
    "num_tokens": 3,
    "num_reference_tokens": 4,
    "stopped": True,
}


def without_answers(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if "answers/" not in name} for row in rows(folder)]


@pytest.fixture
def windows(sft: Sft, model_folder: Path) -> str:
    """The setting that names a Mistral whose attention looks 16 tokens back."""
    folder = sft.folder / "windows"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=264, num_key_value_heads=2, sliding_window=16, **sizes)
    MistralForCausalLM(config).save_pretrained(folder)
    return f"model.path={folder}"


@pytest.mark.parametrize(
    "settings",
    [NOISE, ("adapter=lora", "model.gradient_checkpointing=true", *NOISE)],
    ids=["all weights", "lora"],
)
def test_training_does_not_notice_them(sft: Sft, windows: str, settings: tuple[str, ...]) -> None:
    for name, asked in {"off": (), "on": ON}.items():
        assert sft.train(f"run={name}", *SETTINGS, windows, *settings, *asked) == 0
    off, on = sft.run_folder("off"), sft.run_folder("on")
    assert without_answers(on) == rows(off)
    assert final_files(on) == final_files(off)
    assert [row["step"] for row in rows(on) if row["answers/score"]] == ["0", "2", "4", "6"]
    assert not (off / "samples.jsonl").exists()


def test_a_resumed_run_has_those_of_an_uninterrupted_one(sft: Sft) -> None:
    settings = (*ON, *SETTINGS, "val_every=1", "checkpoint.save_every=3")
    assert sft.train("run=whole", *settings) == 0
    fails = "+callbacks.fails={_target_: mishaps.Mishap, step: 6, rank: null, what: raise}"
    assert sft.train("run=run", *settings, fails) == 1
    file = sft.run_folder() / "samples.jsonl"
    assert len(file.read_text().splitlines()) == 18  # of the steps 0 to 5, two more than the checkpoint has
    with file.open("a") as torn:
        torn.write('{"step": 5, "num')
    assert sft.train("run=run", *settings) == 0
    assert file.read_bytes() == (sft.run_folder("whole") / "samples.jsonl").read_bytes()
    assert rows(sft.run_folder()) == rows(sft.run_folder("whole"))
    assert {(each["number"], each["base"]) for each in answers_file.read(file.parent)} == {
        (each["number"], each["answer"]) for each in answers_file.read(file.parent) if each["step"] == 0
    }


@pytest.mark.xdist_group("strategies")
def test_sharded_ranks_give_those_of_one_process_and_stop_at_different_times(sft: Sft) -> None:
    lines = [{"prompt": f"Say {letter}.", "response": letter * (2 + 4 * at)} for at, letter in enumerate("abcde")]
    for name in ("train.jsonl", "val.jsonl"):
        Path(name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = (
        *("data.path=train.jsonl", "data.val_path=val.jsonl", "data.packing=false", "export=false"),
        *("global_batch_size=2", "micro_batch_size=1", "epochs=15", "val_every=45"),
        *("evaluation.samples=5", "evaluation.max_new_tokens=30", "evaluation.seconds=200"),
    )
    assert sft.train("run=single", *settings) == 0
    alone = answers_file.read(sft.run_folder("single"))
    assert len({each["num_tokens"] for each in alone}) > 1
    for strategy in ("deepspeed_zero3", "fsdp2"):
        ended = sft.ranks(2, "train", *sft.settings, f"run={strategy}", *settings, f"strategy={strategy}")
        assert ended.code == 0, ended.output
        assert answers_file.read(sft.run_folder(strategy)) == alone


@pytest.mark.parametrize(
    "damaged",
    [b"5", b"[]", b"{}", b'{"step": 4', b"\xff\xfe", json.dumps(MADE | {"step": "4"}).encode(), b"[" * 5000],
)
def test_a_damaged_line_is_left_out(tmp_path: Path, damaged: bytes) -> None:
    whole = [json.dumps(MADE | {"step": step}).encode() for step in (3, 4, 9)]
    (tmp_path / "samples.jsonl").write_bytes(b"\n".join([whole[0], damaged, *whole[1:]]) + b"\n")
    assert [answer["step"] for answer in answers_file.read(tmp_path)] == [3, 4, 9]
    answers_file.keep_until(tmp_path, 4)
    assert (tmp_path / "samples.jsonl").read_bytes() == whole[0] + b"\n" + whole[1] + b"\n"


def test_what_fails_is_a_line_and_the_run_continues(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = answers.answer

    def fails_after_the_first(*args: Any, **kwargs: Any) -> list[list[int]]:
        monkeypatch.setattr(answers, "answer", fails)
        return given(*args, **kwargs)

    def fails(*args: Any, **kwargs: Any) -> list[list[int]]:
        raise torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 3 GiB")

    monkeypatch.setattr(answers, "answer", fails_after_the_first)
    assert sft.train("run=run", *SETTINGS, *ON) == 0
    said = "in this run, which continues (OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB)\n"
    assert capsys.readouterr().out.count(said) == 1
    assert {each["step"] for each in answers_file.read(sft.run_folder())} == {0}
    assert rows(sft.run_folder())[-1]["step"] == "6"


def test_a_full_disk_costs_the_answers_of_one_validation(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = answers_file.append

    def full(folder: Path, made: list[Answer]) -> None:
        if made[0]["step"] == 2:
            raise OSError(28, "No space left on device")
        append(folder, made)

    monkeypatch.setattr(answers_file, "append", full)
    assert sft.train("run=run", *SETTINGS, *ON) == 0
    said = "step 2: answers to held-out prompts are lost (OSError: [Errno 28] No space left on device)\n"
    assert capsys.readouterr().out.count(said) == 1
    assert {each["step"] for each in answers_file.read(sft.run_folder())} == {0, 4, 6}


def test_a_signal_during_them_leaves_those_of_this_validation_out(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    given = answers.answer
    lengths: list[int] = []

    def signalled(*args: Any, **kwargs: Any) -> list[list[int]]:
        if len(lengths) == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        made = given(*args, **kwargs)
        lengths.append(max(map(len, made)))
        return made

    monkeypatch.setattr(answers, "answer", signalled)
    assert sft.train("run=run", *SETTINGS, *ON) == 75
    assert lengths[::2] == [12, 1]
    assert sft.train("run=run", *SETTINGS, *ON) == 0
    assert {each["step"] for each in answers_file.read(sft.run_folder())} == {0, 2, 6}


def test_no_time_cuts_them_and_no_validation_asks_none(sft: Sft) -> None:
    assert sft.train("run=run", *ON, "max_steps=1", "export=false", "evaluation.seconds=1e-9") == 0
    made = answers_file.read(sft.run_folder())
    assert {(each["step"], each["num_tokens"], each["stopped"]) for each in made} == {(0, 1, False), (1, 1, False)}
    assert sft.train("run=none", *ON, "max_steps=1", "export=false", "data.val_size=0") == 0
    assert not (sft.run_folder("none") / "samples.jsonl").exists()


def test_a_scorer_of_ones_own(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (*ON, "max_steps=1", "export=false")
    Path("mine.py").write_text("def score(answer, reference):\n    return len(reference) / 100\n")
    assert sft.train("run=run", *settings, "evaluation.scorer._target_=mine.score") == 0
    assert {(each["score"], len(each["reference"]) / 100) for each in answers_file.read(sft.run_folder())} == {
        (0.12, 0.12),
        (0.05, 0.05),
    }
    assert sft.train("run=raises", *settings, "evaluation.scorer._target_=math.sqrt") == 0
    said = "evaluation.scorer failed, so answers are scored by exact match from here on (TypeError: math.sqrt() "
    assert capsys.readouterr().out.count(said) == 1
    assert sft.train("run=none", *settings, "evaluation.scorer={_target_: math.sqrt, _partial_: false}") == 2
    assert "sft: evaluation.scorer: " in capsys.readouterr().err


def test_the_measures_of_a_validation() -> None:
    cut: Answer = {**MADE, "answer": "b", "score": 0.25, "num_tokens": 8, "num_reference_tokens": 40, "stopped": False}
    assert scorers.measures([MADE, cut]) == {
        "answers/score": 0.5,
        "answers/exact": 0.5,
        "answers/base_score": 0.25,
        "answers/stopped": 0.5,
        "answers/length_ratio": 11 / 12,
    }
    assert "answers/base_score" not in scorers.measures([{**MADE, "base_score": None}])


def test_what_is_shown_is_on_one_line_that_a_terminal_does_not_obey() -> None:
    assert list(answers.shown([{**MADE, "answer": "a\n漢\u202e" + "x" * 300}], with_now=True)) == [
        "  1 prompt     Say a.",
        "    reference  aa",
        "    base       b\\x1b[2J",
        "    now        a\\n漢\\u202e" + "x" * 92 + "…",
    ]
