"""A user's mistake: one line that says what, where and what to do; exit code 2; no traceback; nothing half-made."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import AutoTokenizer

from commands.test_resume import final_files
from conftest import tiny_llama
from running import Sft
from sft.checkpoint import safetensors_file
from sft.checkpoint.checkpoint import Checkpoint

Prepare = Callable[[Path], None]


def write(name: str, text: str) -> Prepare:
    return lambda folder: (folder / name).write_text(text) and None


def row(**columns: object) -> str:
    return json.dumps(columns) + "\n"


GOOD = row(prompt="a", response="b")


def model_without_tokenizer(folder: Path) -> None:
    tiny_llama().save_pretrained(folder / "bare")


def model_without_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = None
    tiny_llama().save_pretrained(folder / "bare")
    tokenizer.save_pretrained(folder / "bare")


def model_with_few_embeddings(folder: Path) -> None:
    tiny_llama(vocab_size=100).save_pretrained(folder / "small")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "small")


def model_with_torn_weights(folder: Path) -> None:
    shutil.copytree(folder / "model", folder / "torn")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def a_file_where_a_folder_should_be(folder: Path) -> None:
    (folder / "file").write_text("")


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (nothing, ["data.path=missing.jsonl"], r"missing.jsonl.*no such file"),
        (nothing, ["data.path=./folder"], r"folder.*no such file or folder"),
        (write("data.jsonl", ""), ["data.path=data.jsonl"], r"data.jsonl: the file is empty"),
        (write("data.jsonl", GOOD * 2 + '{"prompt": \n'), ["data.path=data.jsonl"], r"data.jsonl.*line 3"),
        (
            write("data.jsonl", row(question="a", answer="b")),
            ["data.path=data.jsonl"],
            r"no column 'prompt'.*'question', 'answer'",
        ),
        (
            write("data.jsonl", GOOD + row(prompt="a", response=[1])),
            ["data.path=data.jsonl"],
            r"row 1 of data.jsonl: column 'response' holds \[1\] \(list\), not a string",
        ),
        (
            write("data.jsonl", row(prompt="a", response=3)),
            ["data.path=data.jsonl"],
            r"row 0.*column 'response' holds 3 \(int\), not a string",
        ),
        (
            write("data.jsonl", row(prompt="a", response="") * 3),
            ["data.path=data.jsonl"],
            r"empty_response",
        ),
        (
            write("data.jsonl", GOOD * 9 + row(prompt="a", response="")),
            ["data.path=data.jsonl"],
            r"1 of 10 rows.*data.max_lost",
        ),
        (nothing, ["data.max_length=40"], r"overlong.*data.max_length"),
        (nothing, ["data.max_length=1000"], r"data.max_length=1000 is more than the 512 positions"),
        (nothing, ["data.supervise=answers"], r"data.supervise=answers is unknown: set response, all"),
        (nothing, ["data=messages"], r"no column 'messages'"),
        (nothing, ["optimizer.lrr=1"], r"there is no setting optimizer.lrr: did you mean optimizer.lr\?"),
        (nothing, ["globl_batch_size=1"], r"did you mean global_batch_size\?"),
        (nothing, ["lr=1"], r"there is no setting lr: did you mean optimizer.lr\?"),
        (nothing, ["schedule=cosinus"], r"there is no schedule=cosinus: choose constant, cosine, linear"),
        (nothing, ["optimizer.lr=[1"], r"\[1"),
        (nothing, ["epochs=many"], r"epochs=many is not a whole number"),
        (nothing, ["global_batch_size=3"], r"3 packs does not divide.*2 or 4"),
        (nothing, ["model.path=nowhere/at/all"], r"model.path=nowhere/at/all: there is no such folder"),
        (nothing, ["model.path=some/model"], r"the tokenizer some/model can't be loaded"),
        (model_without_tokenizer, ["model.path=./bare"], r"the folder ./bare holds no tokenizer"),
        (model_without_template, ["model.path=./bare"], r"no chat template.*data.conversation.chat=false"),
        (model_with_few_embeddings, ["model.path=./small"], r"token ids up to 258.*only 100 embeddings"),
        (nothing, ["model.chat_template=none.jinja"], r"none.jinja can't be read"),
        (a_file_where_a_folder_should_be, ["runs_dir=file/runs"], r"can't be written"),
        (a_file_where_a_folder_should_be, ["data.cache_dir=file/cache"], r"file.*can.?not? be written"),
        (nothing, ["trainer.devices=2"], r"strategy=ddp"),
        (nothing, ["model.compile=true", "strategy=deepspeed_zero3"], r"breaks up every graph: set strategy=fsdp2"),
        (nothing, ["trainer.accelerator=tpu"], r"trainer.*full_key: trainer"),
        (nothing, ["+optimizer.momentun=1"], r"the optimizer refuses its settings: .*momentun"),
        (nothing, ["optimizer.lr=-1"], r"the optimizer refuses its settings: Invalid learning rate"),
        (model_with_torn_weights, ["model.path=./torn"], r"the model ./torn can't be loaded"),
        (nothing, ["model.config.hidden_sise=3"], r"hidden_sise"),
        (nothing, ["logger=wandb", "logger.mode=online"], r"wandb login"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line(
    sft: Sft,
    prepare: Prepare,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(sft.folder / "netrc"))
    shutil.copytree(sft.settings[0].removeprefix("model.path="), sft.folder / "model")
    prepare(sft.folder)
    capsys.readouterr()
    assert sft.train("run=run", "max_steps=1", *arguments) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("sft: ")
    import re

    assert re.search(message, line), line
    assert not list(sft.folder.glob("runs/*"))
    assert not list(sft.folder.glob("cache/**/.building*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["score"], "run must be given"),
        (["score", "run=none"], "there is no run none: runs/ holds none yet"),
        (["generate", "run=none"], "there is no run none"),
        (["export", "run=none"], "there is no run none"),
        (["trian"], "there is no command trian: did you mean train?"),
    ],
    ids=" ".join,
)
def test_other_commands(sft: Sft, command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft(*command) == 2
    assert message in capsys.readouterr().err


def test_unfinished_run_has_nothing_to_score(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    for command in ("score", "generate"):
        assert sft(command, "run=run", *(["prompt=x"] if command == "generate" else [])) == 2
        assert "has no exported model" in capsys.readouterr().err


@pytest.mark.parametrize(("precision", "factor"), [("32-true", 1.001), ("bf16-mixed", 1.01)])
def test_tampered_export_is_an_error(
    sft: Sft, precision: str, factor: float, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = Checkpoint.tensor
    settings = ("run=run", "max_steps=2", f"trainer.precision={precision}")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "tensor", lambda self, name: tensor(self, name) * factor)
        assert sft.train(*settings) == 2
    assert "is not the model that was trained" in capsys.readouterr().err
    folder = sft.run_folder()
    assert not (folder / "export").exists()
    assert not json.loads((folder / "export.unverified" / "verified.json").read_text())["equal"]
    assert sft.train(*settings) == 0  # only the export is left to do
    assert (folder / "export" / "verified.json").exists()
    assert not (folder / "export.unverified").exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
    ids=["system", "safetensors"],
)
def test_full_disk_in_a_save(
    sft: Sft, error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("run=run", "epochs=1", "val_every=1")
    assert sft.train("run=whole", *settings[1:]) == 0
    write, calls = safetensors_file.write, []

    def full(*arguments: Any) -> dict[str, int]:
        calls.append(arguments)
        if len(calls) == 2:  # the second checkpoint
            raise error
        return write(*arguments)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "write", full)
        assert sft.train(*settings) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sft: the disk is full")
    assert [path.name for path in (sft.run_folder() / "checkpoints").iterdir()] == ["step-00000001"]
    assert json.loads((sft.run_folder() / "status.json").read_text())["state"] == "failed"
    assert sft.train(*settings) == 0
    assert final_files(sft.run_folder()) == final_files(sft.run_folder("whole"))


def test_full_disk_in_the_store(sft: Sft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.data import build

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(build, "fsync", full)
    assert sft.train("run=run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line or "disk is full" in line
    assert not list((sft.folder / "cache" / "stores").iterdir())
