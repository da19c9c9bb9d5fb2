"""A table of runs: the order, the columns, and what is no run."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from running import Sft


def make(name: str, losses: list[float | None], state: str = "finished", **settings: Any) -> None:
    """A run's folder with a validation loss a step, None where a step wasn't validated."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    config = {
        "runs_dir": "runs",
        "seed": settings.get("seed", 0),
        "model": {"path": settings.get("model", "m")},
        "data": {"path": settings.get("data", "d")},
        "optimizer": {"lr": settings.get("lr", 0.1), "betas": settings.get("betas", [0.9, 0.95])},
        "trainer": {"devices": settings.get("devices", 1)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    status = {"state": state, "num_steps": 3, "step": 0}
    (folder / "status.json").write_text(json.dumps(status | ({"error": "[disk] on fire"} if state == "failed" else {})))
    rows = [f"{step},{100 * step},{'' if loss is None else loss}\n" for step, loss in enumerate(losses, 1)]
    (folder / "metrics.csv").write_text("".join(["step,train/tokens_per_second,val/loss\n", *rows]))


@pytest.fixture
def runs(sft: Sft) -> Sft:
    make("a", [3.0, 1.0, 2.0], lr=0.123456789)
    make("b", [3.0, None, 1.5], devices=8, betas=[0.8])
    make("c", [None, None], state="failed", model="n")
    make("d", [float("nan")], state="running", data="[e]")
    return sft


def test_the_lowest_final_loss_is_on_top(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("compare", "runs/a", "b", "runs/c", "runs/d", "runs/a/", "output=table.csv") == 0
    shown = capsys.readouterr().out.splitlines()
    header, _, *table, why = shown
    assert header.split() == [
        "run",
        "state",
        "step",
        *["validation", "loss", "best", "tokens/s", "data.path", "model.path", "betas", "lr"],
    ]
    assert [line.split() for line in table] == [
        ["b", "finished", "3/3", "1.5000", "1.5000", "200", "d", "m", "[0.8]", "0.1"],
        ["a", "finished", "3/3", "2.0000", "1.0000", "200", "d", "m", "[0.9,", "0.95]", "0.123457"],
        ["c", "failed", "2/3", "150", "d", "n", "[0.9,", "0.95]", "0.1"],
        ["d", "running", "1/3", "100", "[e]", "m", "[0.9,", "0.95]", "0.1"],
    ]
    assert why == "c failed: [disk] on fire"
    with open("table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["b", "a", "c", "d"]
    assert (rows[1]["optimizer.lr"], rows[1]["val/loss"], rows[1]["best val/loss"]) == ("0.123456789", "2.0", "1.0")


def test_all_runs_where_none_is_named(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.folder / "runs" / ".multirun").mkdir()
    assert runs("compare", "--cfg", "job") == 0
    assert "runs: []" in capsys.readouterr().out
    assert runs("compare") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["b", "a", "c", "d", "c"]


def test_a_folder_that_is_no_run(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    (runs.folder / "runs" / "thesis=1").mkdir()
    assert runs("compare", "runs/a", "runs/thesis=1") == 2
    assert capsys.readouterr().err == "sft: there is no run runs/thesis=1: runs/ holds a, b, c, d\n"


@pytest.mark.parametrize("command", ["compare runs/a", "generate run=none --prompt x"])
def test_nothing_heavy_is_imported(runs: Sft, command: str) -> None:
    code = f"""
import contextlib, sys
from sft import cli
sys.argv = ["sft", *{command.split()}]
with contextlib.suppress(SystemExit):
    cli.main()
print({{"torch", "lightning", "optuna", "submitit"}} & set(sys.modules))
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "set()"
