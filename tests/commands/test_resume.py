"""A run that is killed at any moment and started again ends as if nothing had happened, bit for bit."""

import json
import signal
from pathlib import Path

import pytest

import mishaps
from runfiles import final_files, rows
from running import Sft
from sft.checkpoint.checkpoint import best, complete
from sft.runs import lease

SETTINGS = (
    "epochs=3",
    "val_every=2",
    "checkpoint.save_every=2",
    "run=run",
    "+model.config.attention_dropout=0.1",
)

MOMENTS = {
    "in a step": mishaps.killed_in_a_step,
    "in a save": mishaps.killed_in_a_save,
    "before a rename": mishaps.killed_before_a_rename,
    "in a removal": mishaps.killed_in_a_removal,
    "in the metrics": mishaps.killed_in_the_metrics,
    "in the store": mishaps.killed_in_the_store,
    "in the export": mishaps.killed_in_the_export,
    "before the first step": mishaps.killed_before_the_first_step,
}


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path
) -> tuple[dict[str, bytes], list[dict[str, str]]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("whole"), model_folder, data_file, monkeypatch)
        result = sft.process("train", *sft.settings, *SETTINGS)
    assert result.code == 0, result.output
    return final_files(sft.run_folder()), rows(sft.run_folder())


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(
    sft: Sft, moment: str, uninterrupted: tuple[dict[str, bytes], list[dict[str, str]]]
) -> None:
    killed = sft.process("train", *sft.settings, *SETTINGS, before=MOMENTS[moment])
    assert killed.code == -signal.SIGKILL, killed.output
    again = sft.process("train", *sft.settings, *SETTINGS)
    assert again.code == 0, again.output

    folder = sft.run_folder()
    files, metrics = uninterrupted
    assert final_files(folder) == files
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(10)]
    assert rows(folder) == metrics
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    # Nothing half-made is left of what was killed.
    assert not list(folder.glob("**/.unfinished*"))
    assert not list((sft.folder / "cache").glob("**/.building*"))
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(lease.NAME)) == [
        "base.safetensors", "checkpoints", "config.yaml", "data.json", "events.jsonl", "export", "metrics.csv",
        "preview.html", "provenance.json", "recipe.json", "report.html", "status.json",
    ]  # fmt: skip


def test_the_uninterrupted_run_itself(uninterrupted: tuple[dict[str, bytes], list[dict[str, str]]]) -> None:
    # Guards the comparison above: something was learned, validated when due, and the last step is there.
    _, metrics = uninterrupted
    assert float(metrics[9]["train/loss"]) < float(metrics[1]["train/loss"]) - 1
    assert [row["step"] for row in metrics if row["val/loss"]] == ["0", "2", "4", "6", "8", "9"]


def test_last_and_best_are_kept(sft: Sft) -> None:
    # Without a learning rate to speak of every loss is the same but for the last bits; keep_last=1 shows the best.
    assert sft.train("run=run", "epochs=3", "val_every=1", "checkpoint.keep_last=1", "export=false") == 0
    kept = complete(sft.run_folder() / "checkpoints")
    lowest = min(rows(sft.run_folder())[1:], key=lambda row: float(row["val/loss"]))
    assert kept[-1].step == 9
    found = best(kept)
    assert found is not None
    assert found.step == int(lowest["step"])
    assert len(kept) == len({9, found.step})


def test_finished_run_says_so_and_stops(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    before = (sft.run_folder() / "status.json").read_bytes()
    capsys.readouterr()
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert (sft.run_folder() / "status.json").read_bytes() == before
