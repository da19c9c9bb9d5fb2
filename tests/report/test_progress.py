"""A run's state, its step and its times, from made-up files and a made-up queue; arithmetic by hand."""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from sft.cluster.slurm import QueuedJob
from sft.errors import UserError
from sft.report.progress import Progress, find
from sft.runs.process import live_process

Story = list[tuple[float, str, dict[str, Any]]]
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC).timestamp()
HERE = {"host": socket.gethostname(), "pid": os.getpid(), "process": live_process(os.getpid())}
GONE = HERE | {"process": "another boot"}


def at(seconds: float) -> str:
    return datetime.fromtimestamp(NOON + seconds, UTC).isoformat()


def make(folder: Path, status: dict[str, Any] | None, story: Story, rows: str) -> Path:
    """A run's folder whose files were last changed 10 s before noon + 1000 s."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    if status is not None:
        (folder / "status.json").write_text(json.dumps(status))
    lines = [json.dumps({"time": at(time), "event": event} | details) + "\n" for time, event, details in story]
    (folder / "events.jsonl").write_text("".join(lines))
    (folder / "metrics.csv").write_text(rows)
    for file in folder.iterdir():
        os.utime(file, (NOON + 990, NOON + 990))
    return folder


STORY: Story = [
    (0, "start", {"step": 0, "hosts": ["n1", "n2"], "num_ranks": 2}),
    (100, "save", {"step": 100, "seconds": 2.0}),
    (110, "signal", {"step": 100}),
    (600, "submit", {"job": 3}),
    (680, "job", {"job": 3}),
    (690, "start", {"step": 100, "hosts": ["n3"], "num_ranks": 1}),
]
ROWS = "step,train/loss,train/seconds,val/loss\n0,,,9.0\n199,2.5,0.5,\n200,2.25,0.5,3.5\n"


def test_times_by_hand(tmp_path: Path) -> None:
    status = {"state": "running", "num_steps": 400, "time": at(680), **HERE}
    run = Progress.read(make(tmp_path / "a", status, STORY, ROWS), now=NOON + 1000)
    assert (run.state, run.step, run.num_steps, run.loss, run.val_loss) == ("running", 200, 400, 2.25, 3.5)
    assert (run.hosts, run.job, run.exit_code) == (("n3",), 3, None)
    # 300 s for the 100 steps from step 100 on, so 3 s each for the 200 that are left, 10 s of which have passed.
    assert run.left == 590
    # The first attempt to its signal, the second until now.
    assert run.taken == 110 + 310


def test_times_without_events(tmp_path: Path) -> None:
    status = {"state": "running", "num_steps": 400, "time": at(680), **HERE}
    run = Progress.read(make(tmp_path / "a", status, [], ROWS), now=NOON + 990)
    assert run.left == 100  # by the steps' own 0.5 s
    assert repr(run.taken) == "nan"
    assert run.hosts == (socket.gethostname(),)


def test_an_ended_run_took_the_time_until_its_end_whenever_its_files_were_copied(tmp_path: Path) -> None:
    status = {"state": "finished", "num_steps": 200, "time": at(800)}
    run = Progress.read(make(tmp_path / "a", status, STORY, ROWS), now=NOON + 9999)
    assert (run.taken, repr(run.left), run.exit_code) == (110 + 110, "nan", 0)


OF_ANOTHER_TYPE = "STATUS is damaged (time=7): sft train writes it again"
WAITS, RUNS = QueuedJob(7, "PENDING", "Resources", "(null)"), QueuedJob(7, "RUNNING", "None", "(null)")
SUBMIT, BEGUN = (0, "submit", {"job": 7}), (5, "job", {"job": 7, "restart": 1})
START, SIGNAL = (9, "start", {"job": 7, "step": 0}), (20, "signal", {"job": 7, "step": 3})
REQUEUE, STOP = (21, "requeue", {"job": 7, "cause": "signal"}), (21, "stop", {"job": 7, "cause": "failed"})
FINISH = (30, "finish", {"job": 7})
RUNNING, DIED, ENDED = {"state": "running", **HERE}, {"state": "running", **GONE}, {"state": "interrupted"}
FAILED, FINISHED = {"state": "failed", "error": "E: why"}, {"state": "finished"}


@pytest.mark.parametrize(
    ("status", "story", "jobs", "state", "code"),
    [
        (None, [SUBMIT], [WAITS], "queued", None),
        (None, [SUBMIT], [RUNS], "starting", None),
        (None, [SUBMIT], None, "new", None),
        (RUNNING, [SUBMIT, START], [RUNS], "running", None),
        (RUNNING, [SUBMIT, START], [RUNS._replace(state="SUSPENDED")], "suspended", None),
        (RUNNING, [START, BEGUN], [RUNS], "starting", None),  # after a lost node
        (RUNNING, [SUBMIT, START], [WAITS], "queued", None),
        (RUNNING, [(0, "start", {})], None, "running", None),
        (RUNNING, [SUBMIT, (9, "start", {})], [WAITS], "running", None),  # by hand, though a job waits
        (ENDED, [START, SIGNAL], [RUNS], "interrupted", None),  # the batch script hasn't requeued it yet
        (ENDED, [START, SIGNAL, REQUEUE], [WAITS], "queued", None),
        (ENDED, [START, SIGNAL, REQUEUE], [RUNS], "queued", None),
        (ENDED, [START, SIGNAL, REQUEUE, BEGUN], [RUNS], "starting", None),
        (ENDED, [START, SIGNAL, REQUEUE], None, "interrupted", None),
        (ENDED, [START, SIGNAL], None, "interrupted", None),
        (ENDED, [START, SIGNAL], [], "interrupted", 75),
        (ENDED, [(0, "start", {}), (9, "by_hand", {})], None, "interrupted", 75),
        (FAILED, [START, STOP], [RUNS], "failed", 1),
        (FAILED, [START], None, "failed", None),
        (FAILED, [START, REQUEUE], [WAITS], "queued", None),
        (FAILED, [(0, "start", {})], None, "failed", 1),
        (DIED, [(0, "start", {})], None, "died", 1),
        (FINISHED, [START, FINISH], [RUNS], "finished", 0),
        (FINISHED, [START, FINISH, (40, "submit", {"job": 7})], [WAITS], "queued", None),
    ],
)
def test_states_of_files_and_queue(
    status: dict[str, Any] | None,
    story: list[Any],
    jobs: list[QueuedJob] | None,
    state: str,
    code: int | None,
    tmp_path: Path,
) -> None:
    run = Progress.read(make(tmp_path / "a", status, story, ""), jobs, now=NOON + 1000)
    assert (run.state, run.exit_code) == (state, code)
    assert run.waits == ("Resources" if jobs == [WAITS] else None)
    assert run.error == ("E: why" if state == "failed" else None)


def test_a_verdict_that_never_came_is_not_waited_for(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", FAILED, [START], "")
    assert [Progress.read(folder, now=NOON + 990 + age).exit_code for age in (59, 61)] == [None, 1]


EMPTY = "STATUS is empty: sft train writes it again"
NO_JSON = "STATUS is damaged (it is no JSON): sft train writes it again"
NO_OBJECT = "STATUS is damaged (it is no JSON object): sft train writes it again"


@pytest.mark.parametrize(
    ("name", "text", "state", "why"),
    [
        ("status.json", "", "unreadable", EMPTY),
        ("status.json", '{"state": "runn', "unreadable", NO_JSON),
        ("status.json", "[1]", "unreadable", NO_OBJECT),
        ("status.json", '{"state": "finished", "time": 7}', "unreadable", OF_ANOTHER_TYPE),
        ("status.json", None, "new", None),
        ("metrics.csv", "step,train/loss,val/loss\n1,4.0,\n2,3.", "finished", None),
        ("metrics.csv", "step,train/loss\x00\xff\n\n\n", "finished", None),
        ("metrics.csv", None, "finished", None),
        ("events.jsonl", '3\nnull\n{"event": "save"}\n{"time": "20', "finished", None),
        ("events.jsonl", None, "finished", None),
        ("config.yaml", None, "finished", None),
        ("config.yaml", "", "finished", None),
    ],
)  # fmt: skip
def test_a_broken_folder(name: str, text: str | None, state: str, why: str | None, tmp_path: Path) -> None:
    folder = make(tmp_path / "a", {"state": "finished", "num_steps": 2, "time": at(800)}, STORY, ROWS)
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    run = Progress.read(folder)
    assert (run.state, run.error) == (state, why and why.replace("STATUS", str(folder / "status.json")))
    if name == "metrics.csv":
        assert run.step == (1 if text and "4.0" in text else 0)


def test_a_running_run_elsewhere_whose_configuration_is_broken(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", {"state": "running", "pid": 1, "host": "elsewhere", "process": None}, [], "")
    (folder / "config.yaml").write_text("a: [")
    assert Progress.read(folder).state == "unreadable"
    (folder / "config.yaml").write_text("")
    assert Progress.read(folder).state == "unreadable"


def test_names_patterns_folders_and_what_a_sweep_has_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a-1", "a-2", "b"):
        make(tmp_path / "runs" / name, None, [], "")
    for other in (".multirun", "notes"):
        (tmp_path / "runs" / other).mkdir()
    jobs = [
        QueuedJob(n, "PENDING", "Priority", f"sft train {tmp_path}/{run}") for n, run in ((1, "runs/a-3"), (2, "x/y"))
    ]
    assert [path.name for path in find([], "runs", jobs)] == ["a-1", "a-2", "b", "a-3"]
    assert [str(path) for path in find(["a-*", "runs/b", "a-1"], "runs", jobs)] == [
        *("runs/a-1", "runs/a-2", "runs/a-3", "runs/b"),
    ]
    assert Progress.read(Path("runs/a-3"), jobs).state == "queued"
    assert find([], "none") == []
    with pytest.raises(UserError, match="there is no run c: runs/ holds a-1, a-2, b"):
        find(["c"], "runs")
