"""sft runs: the states of all runs, those that only Slurm knows of and broken ones too."""

import json
import os
import time
from pathlib import Path

import pytest

from running import Sft
from sft.runs import metrics_file


def make(name: str, age: float, status: str, rows: str = "", job: int | None = None) -> Path:
    """A run's folder that last changed `age` seconds ago."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    (folder / "status.json").write_text(status)
    (folder / "metrics.csv").write_text(f"step,train/loss,val/loss\n{rows}")
    if job:
        event = {"time": "2026-03-01T12:00:00+00:00", "event": "start", "job": job, "restart": 0, "step": 0}
        (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    for file in folder.iterdir():
        os.utime(file, (time.time() - age, time.time() - age))
    return folder


@pytest.fixture
def runs(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> Sft:
    done = {"state": "finished", "num_steps": 2, "host": "n1", "time": "2026-03-01T12:01:40+00:00"}
    make("done", 7200, json.dumps(done), "1,3.0,\n2,2.0,1.5\n", job=3)
    failed = {"state": "failed", "num_steps": 2, "host": "n2", "error": "E: [disk]\n on fire"}
    make("failed", 3000, json.dumps(failed), "1,3.0,\n")
    make("broken", 1800, "")
    stopped = {"state": "interrupted", "num_steps": 90, "time": "2026-03-02T12:00:00+00:00"}
    make("again", 600, json.dumps(stopped), "7,3.0,2.5\n", job=4)
    slurm = sft.folder / "slurm"
    slurm.mkdir()
    queue = f"4|PENDING|Priority|(null)\n5|PENDING|Resources|sft train {sft.folder}/runs/swept\n6|RUNNING|None|(null)\n"
    (slurm / "squeue").write_text(f"#!/bin/sh\ncat <<'E'\n{queue}E\n")
    (slurm / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    return sft


TABLE = """
run      state        step       time   validation loss   host   job      changed
─────────────────────────────────────────────────────────────────────────────────
swept    queued        0/?                                         5
again    queued       7/90   24:00:00            2.5000            4   10 min ago
broken   unreadable    0/?                                             30 min ago
failed   failed        1/2                                n2           50 min ago
done     finished      2/2    0:01:40            1.5000   n1       3      2 h ago
broken unreadable: runs/broken/status.json is empty: sft train writes it again
failed failed: E: [disk] on fire
"""


def test_all_runs_the_newest_first(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("runs") == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == TABLE.splitlines()[1:]


def test_some_runs(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, names in (
        (["state=queued"], ["swept", "again"]),
        (["runs/done", "b*"], ["broken", "done"]),
        (["run=done"], ["done"]),
        (["run=[done,failed]", "state=failed"], ["failed"]),
    ):
        assert runs("runs", *arguments) == 0
        table = capsys.readouterr().out.splitlines()[2 : 2 + len(names)]
        assert [line.split()[0] for line in table] == names
    assert runs("runs", "state=died") == 0
    assert capsys.readouterr().out == "no run is died\n"


@pytest.mark.parametrize("slurm", ["exit 1", "sleep 9"])
def test_slurm_that_does_not_answer(
    slurm: str, runs: Sft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.commands.runs.PATIENCE", 0.2)
    Path("slurm/squeue").write_text(f"#!/bin/sh\n{slurm}\n")
    assert runs("runs", "again") == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["again", "interrupted", "7/90"]


def test_two_hundred_runs_are_listed_at_once(
    sft: Sft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = json.dumps({"state": "finished", "num_steps": 501, "host": "n1", "time": "2026-03-01T12:01:40+00:00"})
    rows = "".join(f"{step},{1 / step},\n" for step in range(1, 501)) + "501,1.0,2.0\n"
    for number in range(200):
        make(f"r{number}", 0, status, rows, job=number)
    read = 0
    parse = metrics_file._whole

    def counting(block: bytes) -> list[bytes]:
        nonlocal read
        read += len(block)
        return parse(block)

    monkeypatch.setattr(metrics_file, "_whole", counting)
    assert sft("runs") == 0
    assert len(capsys.readouterr().out.splitlines()) == 202
    assert read <= 200 * metrics_file.BLOCK
