"""A rehearsal goes through all stages of a job, and names the stage of a fault that is planted in it."""

import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from conftest import CHATML
from pages import COMMANDS, ROOT
from running import Sft
from sft.commands.rehearse import check_stops
from sft.errors import UserError
from sft.proof.rank_pool import LAUNCHERS
from sft.proof.rehearsal import Failed, Mistaken, failure, run_command

STAGES = ["check", "proof", "train", "validate", "save", "SIGUSR1", "resume", "export", "generate"]
# As it would be queued: 4 nodes of 8 GPUs.
JOB = ("trainer=gpu", "trainer.num_nodes=4", "trainer.devices=8", "global_batch_size=64", "data.max_length=256")


@pytest.fixture
def temporary(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which rehearsals make theirs."""
    folder = sft.folder / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def rehearse(sft: Sft, *arguments: str) -> int:
    return sft("rehearse", *sft.settings, *arguments)


def stages(printed: str) -> list[str]:
    """The stages that went through."""
    return re.findall(r"^  (\S+) +[\d.]+ s  ", printed, re.M)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("sft rehearse")])
def test_readme_command_goes_through_all_stages(
    line: str, sft: Sft, temporary: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sft.folder / "gsm8k"
    data.mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}"} for n in range(30)]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, command, *arguments = shlex.split(line, comments=True)
    own = [f"model.path={model_folder}", f"data.path={data}", "data.max_length=256", "data.num_workers=1"]
    assert sft(command, *arguments, *own) == 0
    printed = capsys.readouterr().out
    assert stages(printed) == STAGES
    assert "32 ranks" in printed
    assert "30 samples end in <|im_end|>" in printed
    assert "stopped by SIGUSR1 after step 3" in printed
    assert not any((sft.folder / name).exists() for name in ("runs", "cache"))
    assert not list(temporary.iterdir())


def without_stop(folder: Path) -> None:
    (folder / "endless.jinja").write_text(CHATML.replace("<|im_end|>", ""))


def file_for_a_folder(folder: Path) -> None:
    (folder / "file").write_text("")


@pytest.mark.parametrize(
    ("prepare", "arguments", "reason"),
    [
        (without_stop, ["model.chat_template=endless.jinja"], "would never learn to stop"),
        (None, ["strategy=ddp", *JOB, "global_batch_size=48"], "48 packs does not divide among 32 ranks"),
        (None, [*JOB], "the trainer has 32: set strategy=ddp"),
        (None, ["adapter=qlora", "strategy=fsdp2", *JOB], "strategy=fsdp2 can't shard weights in 4 bits"),
        (file_for_a_folder, ["runs_dir=file/runs"], "can't be written"),
        (None, ["runs_dir=/proc/runs"], "can't be written"),
        (None, ["data.max_length=1000"], "more than the 512 positions"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_faults_that_need_no_training(
    sft: Sft,
    temporary: Path,
    prepare: Callable[[Path], None] | None,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if prepare:
        prepare(sft.folder)
    assert rehearse(sft, *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("sft: check failed: ")
    assert reason in line
    assert not list(temporary.iterdir())


def test_a_callback_that_raises_on_save(
    sft: Sft, temporary: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sft.folder / "own_callbacks.py"
    module.write_text(
        "from lightning.pytorch.callbacks import Callback\nclass Own(Callback):\n"
        "    def state_dict(self):\n        raise KeyError('ema')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{sft.folder}:{ROOT / 'src'}")
    assert rehearse(sft, "+callbacks.own._target_=own_callbacks.Own") == 2
    printed = capsys.readouterr()
    assert stages(printed.out) == ["check", "proof"]
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("sft: train failed: the state of Own can't be saved and read again (KeyError: 'ema'): keep ")
    assert "Traceback" in Path(line.rpartition("; see ")[2]).read_text()
    assert not (sft.folder / "runs").exists()
    (left,) = temporary.iterdir()
    shutil.rmtree(left)


def test_an_optimizer_that_cannot_be_offloaded(sft: Sft, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(sft, *JOB, "strategy=deepspeed_zero2_offload", "optimizer=sgd") == 2
    printed = capsys.readouterr()
    assert stages(printed.out) == []
    (line,) = printed.err.strip().splitlines()
    assert re.match(r"sft: check failed: .*the optimizer is torch\.optim\.SGD: set optimizer=adamw", line)


def test_a_lora_target_that_is_no_layer(sft: Sft, temporary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(sft, "adapter=lora", "adapter.target_modules=[nonsense]") == 2
    printed = capsys.readouterr()
    assert stages(printed.out) == ["check"]
    assert re.match(r"sft: train failed: .*nonsense.*; see .*train\.log$", printed.err.strip())


def prepared(tokenizer: object, ids: list[int], labels: list[int]) -> SimpleNamespace:
    class Train(list):
        source = staticmethod(lambda index: "rows.jsonl")
        row = staticmethod(lambda index: index)

    return SimpleNamespace(
        tokenizer=tokenizer,
        stop_token_ids=[ids[-1]],
        splits=SimpleNamespace(train=Train([map(np.array, (ids, labels))])),
    )


def test_stop_token_has_to_be_supervised(tokenizer: object) -> None:
    assert check_stops(prepared(tokenizer, [65, 66, 258], [-100, 66, 258])) == "<|im_end|>"
    with pytest.raises(
        UserError, match=r"rows.jsonl row 0: the last supervised token is 'c' .* ends in '<\|im_end\|>'"
    ):
        check_stops(prepared(tokenizer, [65, 66, 258], [-100, 66, -100]))
    with pytest.raises(UserError, match="the last supervised token is 'c'"):  # no special token
        check_stops(prepared(tokenizer, [65, 258, 66], [-100, 258, 66]))


def test_a_command_that_hangs_is_ended(sft: Sft) -> None:
    log, lines = sft.folder / "log", []
    with pytest.raises(Failed, match=r"did not end within 0\.1 seconds"):
        run_command(["train", *sft.settings], log, lines.append, timeout=0.1)
    run_command(["--help"], log, lines.append, timeout=60)
    assert "  sft COMMAND [setting=value ...]" in lines
    with pytest.raises(Failed, match="there is no command trian: did you mean train"):
        run_command(["trian"], log, lines.append, timeout=60)


def test_a_rehearsal_inside_a_job_is_no_part_of_it() -> None:
    theirs = ["SLURM_PROCID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"]
    assert [name for name in [*theirs, "PATH", "HF_HOME", "MY_RANK"] if name.startswith(LAUNCHERS)] == theirs


def test_the_reason_of_a_failure() -> None:
    own = "Traceback (most recent call last):\n" + "".join(
        f'  File "{file}", line {n}, in f\n    x()\n'
        for n, file in enumerate(["/usr/lib/python3/site-packages/lightning/x.py", "/home/me/mine.py", "<string>"])
    )
    failed = failure(
        f"step 1\n{own}RuntimeError: rank 1 has failed: OSError\n{own}OSError: no\n{own}ValueError: x\n", 1
    )
    assert (str(failed), type(failed)) == ("OSError: no (/home/me/mine.py, line 1, in f)", Failed)
    mistake = failure(f"sft: the optimizer refuses\n{own}RuntimeError: x\nsft: the optimizer refuses\n", 2)
    assert (str(mistake), type(mistake)) == ("the optimizer refuses", Mistaken)
    assert str(failure("step 1\n", -9)) == "it was killed by SIGKILL"
    assert str(failure("step 1\nwent wrong\n\n", 3)) == "it ended with exit code 3: went wrong"
