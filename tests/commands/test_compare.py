"""A table of runs: the order, the columns, and what is no run."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from running import Sft
from sft.commands.compare import show
from sft.runs.process import live_process
from sft.runs.results import Result
from sft.runs.run import Run


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
        *["validation", "loss", "best", "tokens/s", "lr", "betas", "data.path", "model.path"],
    ]
    assert [line.split() for line in table] == [
        ["b", "finished", "3/3", "1.5000", "1.5000", "200", "0.1", "[0.8]", "d", "m"],
        ["a", "finished", "3/3", "2.0000", "1.0000", "200", "0.123457", "[0.9,0.95]", "d", "m"],
        ["c", "failed", "2/3", "150", "0.1", "[0.9,0.95]", "d", "n"],
        ["d", "running", "1/3", "100", "0.1", "[0.9,0.95]", "[e]", "m"],
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
    line = f"sft: there is no run runs/thesis=1: runs/ holds a, b, c, d (looked in {runs.folder})\n"
    assert capsys.readouterr().err == line


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


# Two very different runs, as the demo's are: many settings differ.
COMMON = {
    "data.path": ("cache/demo/train.jsonl", "cache/demo/pretrain.jsonl"),
    "model.path": ("runs/demo-base/export", None),
    "model.config.hidden_size": (None, 128),
    "model.init": ("pretrained", "random"),
    "optimizer.lr": (0.001, 0.003),
    "epochs": (12, 3),
    "adapter.target_modules": ("q_proj and v_proj of all layers", "all-linear"),
}
TWO = [
    Result(name, {key: pair[i] for key, pair in COMMON.items()}, "finished", 1234, 1234, loss, loss, 11462.0)
    for i, (name, loss) in enumerate([("demo", 0.0041), ("demo-base", 1.25)])
]


TABLES = {
    100: """
run         state           step   validation loss     best   tokens/s      lr   epochs         init
────────────────────────────────────────────────────────────────────────────────────────────────────
demo        finished   1234/1234            0.0041   0.0041     11,462   0.001       12   pretrained
demo-base   finished   1234/1234            1.2500   1.2500     11,462   0.003        3       random
4 more settings differ: sft compare output=runs.csv writes all
""",
    80: """
run         state           step   validation loss     best   tokens/s      lr
──────────────────────────────────────────────────────────────────────────────
demo        finished   1234/1234            0.0041   0.0041     11,462   0.001
demo-base   finished   1234/1234            1.2500   1.2500     11,462   0.003
6 more settings differ: sft compare output=runs.csv writes all
""",
    60: """
run         state           step   validation loss     best
───────────────────────────────────────────────────────────
demo        finished   1234/1234            0.0041   0.0041
demo-base   finished   1234/1234            1.2500   1.2500
7 more settings differ: sft compare output=runs.csv writes all
""",
    20: """
run         validation loss
───────────────────────────
demo                 0.0041
demo-base            1.2500
7 more settings differ: sft compare output=runs.csv writes all
""",
}


@pytest.mark.parametrize("width", TABLES)
def test_only_what_fits_is_shown_and_nothing_is_cut(width: int) -> None:
    file = io.StringIO()
    show(TWO, Console(file=file, width=width))
    assert "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines()) == TABLES[width][1:]


def test_a_long_value_keeps_both_of_its_ends() -> None:
    file = io.StringIO()
    show(TWO, Console(file=file, width=180))
    _, _, first, second, left = file.getvalue().splitlines()
    assert "   q_proj and …f all layers   " in first
    assert "   all-linear   cache/demo/…etrain.jsonl   " in second
    assert left == "1 more setting differs: sft compare output=runs.csv writes all"


@pytest.mark.parametrize(
    ("changes", "hours", "state"),
    [
        ({}, 9, "running"),  # this process
        ({"process": "another boot"}, 0, "died"),
        ({"pid": 2**22 + 1}, 0, "died"),
        ({"host": "elsewhere"}, 0.27, "running"),
        ({"host": "elsewhere"}, 3, "silent 3 h"),
        ({"host": "elsewhere", "hang_after": 4 * 3600}, 3, "running"),
        ({"host": "elsewhere"}, 0.3, "silent 18 min"),
        ({"host": "elsewhere"}, 72, "silent 3 d"),
        ({"process": None}, 3, "silent 3 h"),
        ({"state": "interrupted", "pid": 2**22 + 1}, 3, "interrupted"),
    ],
    ids=str,
)
def test_a_run_that_died(
    changes: dict[str, Any], hours: float, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make("a", [3.0, 2.0], state="running")
    folder = Path("runs/a")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if "hang_after" in changes:
        config["cluster"] = {"hang_after": changes["hang_after"]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    own = {"host": socket.gethostname(), "pid": os.getpid(), "process": live_process(os.getpid())}
    status = json.loads((folder / "status.json").read_text()) | own | changes
    (folder / "status.json").write_text(json.dumps(status))
    for name in ("status.json", "metrics.csv"):
        then = (folder / name).stat().st_mtime - 3600 * hours
        os.utime(folder / name, (then, then))
    result = Result.read(Run(folder))
    assert (result.state, result.step) == (state, 2)
