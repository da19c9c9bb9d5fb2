"""sft watch: on a terminal until the run ends, in lines elsewhere, and how it ends."""

import io
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from runfiles import ANSWER
from running import Sft
from sft.commands import watch
from sft.commands.watch import Queue, Watched, follow
from sft.runs import answers_file, events
from sft.runs.process import live_process

HERE = {"host": socket.gethostname(), "pid": os.getpid(), "process": live_process(os.getpid())}


class Made:
    """A run's folder as training writes it, a change at a time."""

    def __init__(self, name: str, state: str = "running") -> None:
        self.folder = Path("runs") / name
        self.folder.mkdir(parents=True)
        (self.folder / "config.yaml").write_text("{}")
        self.mark(state)
        events.record(self.folder, "start", step=0, hosts=["n1"], num_ranks=1)
        self.rows = "step,train/loss,val/loss\n"

    def mark(self, state: str, **more: Any) -> None:
        status = HERE | {"state": state, "num_steps": 4, "time": "2026-03-01T12:00:00+00:00"} | more
        (self.folder / "status.json").write_text(json.dumps(status))

    def row(self, row: str) -> None:
        self.rows += row
        (self.folder / "metrics.csv").write_text(self.rows)

    def answer(self, step: int, answer: str) -> None:
        for number in (0, 1):
            given: Any = {"step": step, "number": number, "prompt": f"p{number}", "reference": "r", "answer": answer}
            answers_file.append(self.folder, [ANSWER | given])


@pytest.fixture
def made(sft: Sft) -> Made:
    run = Made("a")
    run.row("0,,9.0\n1,3.5,\n")
    return run


def meanwhile(monkeypatch: pytest.MonkeyPatch, *changes: Callable[[], object]) -> None:
    """Each wait for the next look makes the next of the changes."""
    left = list(changes)
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=lambda seconds: left.pop(0)())
    monkeypatch.setattr(watch, "time", clock)


def terminal() -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=True, width=80, height=30, color_system=None, legacy_windows=False), file


def test_followed_on_a_terminal_until_its_end(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = terminal()

    def ends() -> None:
        made.row("4,2.0,2.25\n")
        made.mark("finished")

    meanwhile(
        monkeypatch,
        lambda: made.row("2,3.0,\n"),
        lambda: made.answer(2, "yes"),
        lambda: events.record(made.folder, "save", step=2, seconds=0.5),
        ends,
    )
    assert follow([Watched(made.folder, Queue())], console, 1.0) == 0
    live, _, after = file.getvalue().partition("\x1b[?1049l")  # back from the whole screen
    assert live.startswith("\x1b[?1049h")
    frames = live.split("\x1b[H")[2:]
    assert [re.findall(r" (\d/4)", frame) for frame in frames] == [["1/4"], ["2/4"], ["2/4"], ["2/4"], ["4/4"]]
    assert ["answer     yes" in frame for frame in frames] == [False, False, True, True, True]
    assert ["save      step 2, in 0.5 s" in frame for frame in frames] == [False] * 3 + [True] * 2
    assert all("Ctrl-C ends the watch, not the run" in frame for frame in frames)
    assert "a  finished  on n1" in after and "4/4  100%" in after and "Ctrl-C" not in after


def test_ctrl_c_ends_it_alone(made: Made, sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(seconds: float) -> None:
        raise KeyboardInterrupt

    console, file = terminal()
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    monkeypatch.setattr(watch, "time", SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=stop))
    before = {path: path.read_bytes() for path in made.folder.iterdir()}
    assert sft("watch") == 130
    assert "\x1b[?1049l" in file.getvalue() and "\x1b[?25h" in file.getvalue()  # the terminal is as it was
    assert {path: path.read_bytes() for path in made.folder.iterdir()} == before


def test_in_lines_where_there_is_no_terminal(
    made: Made, sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        made.row("3,1.0,1.5\n")
        made.mark("failed", error="E: no\x1b[2J")

    meanwhile(monkeypatch, lambda: made.row("2,3.0,2.5\n"), lambda: made.answer(2, "x"), fails)
    assert sft("watch", "a") == 1
    printed = capsys.readouterr().out
    snapshot, _, news = printed.partition("a  step 2/4")
    assert "a  running  on n1" in snapshot and "validation loss     9.0000     9.0000     9.0000" in snapshot
    assert re.sub(r"\d:\d\d:\d\d left", "LEFT", news).splitlines() == [
        "  training loss 3.0000  validation loss 2.5000  LEFT",
        "a  step 3/4  training loss 1.0000  validation loss 1.5000",
        r"a  failed at step 3: E: no\x1b[2J",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", printed)


@pytest.mark.parametrize(
    ("state", "code"), [("running", 0), ("finished", 0), ("failed", 1), ("died", 1), ("interrupted", 75)]
)
def test_once(state: str, code: int, sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    made = Made("a")
    made.row("0,,9.0\n1,3.5,\n")
    made.mark("running" if state == "died" else state, **({"process": "another boot"} if state == "died" else {}))
    assert sft("watch", "once=true") == code
    assert capsys.readouterr().out.startswith(f"a  {state}  on n1\n")


def test_the_newest_running_one_else_the_newest(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    for name, state, hour in (("old", "running", 1), ("new", "running", 2), ("newest", "finished", 3)):
        Made(name).mark(state, time=f"2026-03-01T0{hour}:00:00+00:00")
    sft("watch", "once=true")
    assert capsys.readouterr().out.startswith("new  running")
    Made("a").mark("finished", time="2026-03-01T02:30:00+00:00")
    for name in ("old", "new"):
        Made.mark(_at(name), "finished", time="2026-03-01T01:00:00+00:00")
    sft("watch", "once=true")
    assert capsys.readouterr().out.startswith("newest  finished")


def _at(name: str) -> Made:
    run = Made.__new__(Made)
    run.folder = Path("runs") / name
    return run


def test_several_a_line_each_until_all_have_ended(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Made("b", "finished")
    other.row("4,2.0,2.25\n")
    console, file = terminal()
    meanwhile(monkeypatch, lambda: made.row("2,3.0,\n"), lambda: made.mark("interrupted"))
    assert follow([Watched(run.folder, Queue()) for run in (other, made)], console, 1.0) == 75
    last = file.getvalue().rpartition("\x1b[?1049l")[2].splitlines()
    assert [line.split()[:3] for line in last[-2:]] == [["b", "finished", "4/4"], ["a", "interrupted", "2/4"]]
    assert last[-2].rstrip().endswith("━━━━━━━━━━")
    failed = Made("c", "failed")
    assert follow([Watched(run.folder, Queue()) for run in (other, made, failed)], console, 1.0) == 1


def test_a_queued_run_is_waited_for(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As sft submit leaves it: no configuration yet."""
    folder = Path("runs/a")
    (folder / "logs").mkdir(parents=True)
    events.record(folder, "submit", job=7, restart=0)
    slurm = sft.folder / "slurm"
    slurm.mkdir()
    squeue = slurm / "squeue"

    def answer(text: str) -> None:
        squeue.write_text(f"#!/bin/sh\necho '{text}'\n")
        squeue.chmod(0o755)

    answer("7|PENDING|Resources|(null)")
    monkeypatch.setenv("PATH", f"{slurm}:/usr/bin:/bin")
    monkeypatch.setattr(watch, "ASK_EVERY", 0.0)

    def begins() -> None:
        answer("7|RUNNING|None|(null)")
        events.record(folder, "job", job=7, restart=0)

    def runs() -> None:
        (folder / "status.json").write_text(json.dumps({"state": "running", "num_steps": 4, **HERE}))
        events.record(folder, "start", job=7, restart=0, step=0, hosts=["n2"])

    def ends() -> None:
        (folder / "status.json").write_text(json.dumps({"state": "finished", "num_steps": 4}))
        events.record(folder, "finish", job=7, restart=0, step=4)

    meanwhile(monkeypatch, begins, runs, ends)
    assert sft("watch") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("a  queued  job 7  waits: Resources\n")
    states = re.findall(r"^a  (\w+) at step", printed, re.M)
    assert states == ["starting", "running", "finished"]


def test_files_that_break_meanwhile(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    console, file = terminal()
    (made.folder / "samples.jsonl").write_text('{"step": 1}\n[1]\n3\n')

    def ends() -> None:
        (made.folder / "status.json").unlink()
        made.mark("finished")

    meanwhile(
        monkeypatch,
        lambda: (made.folder / "status.json").write_text(""),
        lambda: (made.folder / "metrics.csv").write_text("\xff\x00"),
        lambda: (made.folder / "metrics.csv").unlink(),
        ends,
    )
    assert follow([Watched(made.folder, Queue())], console, 1.0) == 0
    assert "unreadable" in file.getvalue()
