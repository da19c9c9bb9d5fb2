"""A user's mistake: one line that says what, where and what to do; exit code 2; no traceback; nothing half-made."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from runfiles import final_files
from running import Sft
from sft.checkpoint import safetensors_file
from sft.checkpoint.checkpoint import Checkpoint


def torn_weights(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def a_bad_row(folder: Path) -> None:
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": [1]}]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_file_for_a_folder(folder: Path) -> None:
    (folder / "file").write_text("")


def nothing(folder: Path) -> None:
    pass


# One of each kind; each refusal by itself: tests/test_mistakes.py, tests/training/test_settings.py, tests/data, ...
@pytest.mark.parametrize(
    ("prepare", "arguments", "line"),
    [
        (nothing, ["optimizer.lrr=1"], "there is no setting optimizer.lrr: did you mean optimizer.lr?"),
        (nothing, ["epochs=many"], "epochs=many is not a number above 0"),
        (nothing, ["data.path=no.jsonl"], "no.jsonl: no such file or folder (looked in {folder})"),
        (
            a_bad_row,
            ["data.path=data.jsonl"],
            "1 of 2 rows lost, more than data.max_lost=0.05 of them: 1 not_a_text (data.jsonl line 2: column "
            "'response' holds [1] (list), not a string); correct these rows or raise data.max_lost",
        ),
        (
            nothing,
            ["data.max_length=40"],
            "53 of 60 rows lost, more than data.max_lost=0.05 of them: 53 overlong (rows.jsonl line 1, rows.jsonl line "
            "2, rows.jsonl line 4, ...: a sample of 49 tokens, and data.max_length=40): raise data.max_length or set "
            "data.overlong=truncate_prompt; correct these rows or raise data.max_lost",
        ),
        (
            nothing,
            ["data.max_length=1000"],
            "data.max_length=1000 is more than the 512 positions of ./model: set data.max_length=512 or less",
        ),
        (
            a_file_for_a_folder,
            ["runs_dir=file/runs"],
            "file/runs/run can't be written ({folder}/file: Not a directory): set runs_dir to another folder",
        ),
        (
            a_file_for_a_folder,
            ["data.cache_dir=file/cache"],
            "file/cache: the token store cannot be written (Not a directory): make room or set data.cache_dir to "
            "another folder",
        ),
        (
            torn_weights,
            [],
            "the model ./model (LlamaForCausalLM) can't be loaded: Error while deserializing header: incomplete "
            "metadata, file not fully covered",
        ),
        (
            nothing,
            ["optimizer._target_=torch.optim.Adagrad"],
            "the optimizer refuses its settings: Adagrad.__init__() got an unexpected keyword argument 'betas'",
        ),
        (
            nothing,
            ["logger=wandb", "logger.mode=online"],
            "logger.mode=online needs a W&B key: run `wandb login`, or set logger.mode=offline",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line(
    sft: Sft,
    prepare: Callable[[Path], None],
    arguments: list[str],
    line: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(sft.folder / "netrc"))
    shutil.copytree(sft.settings[0].removeprefix("model.path="), sft.folder / "model")
    prepare(sft.folder)
    capsys.readouterr()
    assert sft.train("run=run", "max_steps=1", "model.path=./model", *arguments) == 2
    assert capsys.readouterr().err == f"sft: {line.format(folder=sft.folder)}\n"
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
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
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
        patch.setattr(Checkpoint, "tensor", lambda self, name, **average: tensor(self, name, **average) * factor)
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
        calls.append("checkpoints" in str(arguments[0]))
        if sum(calls) == 2:  # the second checkpoint
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
    from sft.data import staging

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(staging, "fsync", full)
    assert sft.train("run=run") == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "No space left on device" in line or "disk is full" in line
    assert not list((sft.folder / "cache" / "stores").iterdir())
