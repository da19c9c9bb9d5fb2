"""Why a job ended, by what its ranks, srun and Slurm left behind; and the policy that follows."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.cluster.requeue_policy import Death, decide, ended_by_slurm, examine
from sft.errors import NotFinite, UserError
from sft.runs import events, failure

BUDGETS = yaml.safe_load((Path(__file__).parents[2] / "conf" / "cluster" / "default.yaml").read_text())["max_requeues"]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (NotFinite("step 3: the loss is nan"), "not_finite"),
        (UserError("data.path=x is missing"), "misconfigured"),
        (PermissionError(13, "Permission denied", "/runs"), "misconfigured"),
        (OSError(28, "No space left on device"), "disk_full"),
        (RuntimeError("SafetensorError: I/O error: No space left on device"), "disk_full"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 3 GiB"), "out_of_memory"),
        (ArithmeticError("other"), "failed"),
    ],
)
def test_cause_of_an_exception(error: Exception, cause: str) -> None:
    assert failure.cause(error) == cause
    wrapped = RuntimeError("while it trained")
    wrapped.__cause__ = error
    assert failure.cause(wrapped) == cause


def report(folder: Path, rank: int, error: str, at: float, cause: str = "failed", following: bool = False) -> None:
    fields: dict[str, Any] = {"rank": rank, "host": f"n{rank}", "time": at, "step": 7, "cause": cause}
    fields |= {"following": following, "error": error, "traceback": f"Traceback of {error}"}
    (folder / f"attempt-1-rank-{rank}.json").write_text(json.dumps(fields))


def test_first_error_of_the_first_rank_counts_not_what_followed_from_it(tmp_path: Path) -> None:
    report(tmp_path, 0, "RuntimeError: Connection closed by peer", at=1.0, following=True)
    report(tmp_path, 3, "ValueError: later", at=3.0)
    report(tmp_path, 2, "ValueError: first", at=2.0)
    log = "srun: error: n2: task 2: Exited with exit code 1\nsrun: error: n0: task 0: Killed\n"
    death = examine(tmp_path, 1, 137, 6, log)
    assert (death.cause, death.step, death.rank, death.host) == ("failed", 7, 2, "n2")
    assert death.error == "ValueError: first" and death.details == "Traceback of ValueError: first"
    assert examine(tmp_path, 2, 1, 6, "").error == "a rank ended: exit code 1"  # those are of another attempt


def test_exception_that_follows_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, error in enumerate([RuntimeError("[gloo] Connection closed by peer [10.0.0.2]:1"), ValueError("mine")]):
        monkeypatch.setenv("SLURM_PROCID", str(rank))
        failure.write(tmp_path, error)
    assert [report["rank"] for report in failure.read(tmp_path, 0)] == [1, 0]


@pytest.mark.parametrize("damaged", [b"", b'{"rank": 0', b"[]", b"\xff{}", b'{"rank": 0}'])
def test_a_damaged_report_hides_no_other(tmp_path: Path, damaged: bytes) -> None:
    report(tmp_path, 1, "ValueError: mine", at=1.0)
    (tmp_path / "attempt-1-rank-0.json").write_bytes(damaged)
    assert examine(tmp_path, 1, 1, 6, "").error == "ValueError: mine"


def test_a_mistake_leaves_no_traceback_in_the_job_s_log(tmp_path: Path) -> None:
    failure.write(tmp_path, UserError("data.path=x is missing"))
    death = examine(tmp_path, 0, 2, 0, "")
    assert (death.error, death.details) == ("UserError: data.path=x is missing", "")
    failure.write(tmp_path, ArithmeticError("other"))
    assert examine(tmp_path, 0, 1, 0, "").details == "ArithmeticError: other\n"


@pytest.mark.parametrize(
    ("log", "code", "cause", "rank"),
    [
        ("srun: error: n2: task 3: Killed\nsrun: error: n1: task 0: Terminated\n", 137, "killed", 3),
        ("srun: error: n2: tasks 2-3: Segmentation fault (core dumped)\n", 139, "killed", 2),
        ("srun: error: n2: task 1: User defined signal 1\nsrun: error: n2: task 0: Killed\n", 137, "signal", 1),
        ("srun: error: n2: task 1: Alarm clock\n", 142, "hung", 1),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=3.0\n", 137, "out_of_memory", None),
        ("srun: error: n2: task 1: Out Of Memory\n", 125, "out_of_memory", 1),
        ("", 137, "killed", None),
        ("srun: error: n2: task 1: Exited with exit code 7\n", 7, "failed", 1),
    ],
)
def test_rank_that_left_no_report(tmp_path: Path, log: str, code: int, cause: str, rank: int | None) -> None:
    (tmp_path / "rank-1.err").write_text("restart 0 on n2\nold\nrestart 1 on n2\n[W1120 noise\nits last words\n")
    death = examine(tmp_path, 1, code, 6, log)
    assert (death.cause, death.step, death.rank) == (cause, 6, rank)
    assert death.details == ("its last words" if rank == 1 and cause != "out_of_memory" else "")


def test_ranks_that_hung_left_their_stacks(tmp_path: Path) -> None:
    (tmp_path / "attempt-1-rank-0.stack").write_text("Thread 0x1 (most recent call first): all_reduce")
    (tmp_path / "attempt-1-rank-1.stack").touch()
    report(tmp_path, 1, "RuntimeError: Connection reset by peer", at=1.0, following=True)
    death = examine(tmp_path, 1, 137, 6, "srun: error: n1: task 0: Alarm clock\n")
    assert death.cause == "hung" and "all_reduce" in death.details


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("slurmstepd-n1: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-20T18:58:19 ***", ""),
        ("slurmstepd: error: *** JOB 1 ON n1 CANCELLED AT 2026-11-20T18:58:19 DUE to SIGNAL Terminated ***", ""),
        (
            "slurmstepd: error: *** JOB 2 ON n1 CANCELLED AT 2026-11-20T18:59:46 DUE TO TIME LIMIT ***",
            "DUE TO TIME LIMIT",
        ),
        ("slurmstepd: error: *** STEP 2.0 ON n1 CANCELLED AT 2026-11-20T18:59:46 ***", None),  # by srun
        ("step 1/18", None),
    ],
)
def test_slurms_own_message(line: str, reason: str | None) -> None:
    assert ended_by_slurm(f"job 1 restart 0 on n1\n{line}\nsrun: got SIGCONT\n") == reason


def test_torn_line_of_the_story_is_left_out(tmp_path: Path) -> None:
    events.record(tmp_path, "start", step=0)
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"time": "2026", "eve')
    events.record(tmp_path, "save", step=4)
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "save"]


def requeued(cause: str, step: int) -> dict[str, Any]:
    return {"event": "requeue", "cause": cause, "step": step}


@pytest.mark.parametrize(
    ("cause", "earlier", "requeue", "why"),
    [
        ("killed", [], True, "1 of cluster.max_requeues.killed=3"),
        ("killed", [requeued("killed", 3), requeued("killed", 5)], True, "3 of cluster.max_requeues.killed=3"),
        ("killed", [requeued("killed", step) for step in (3, 5, 6)], False, "requeued 3 times for it"),
        ("killed", [requeued("killed", 7)], False, "the same failure twice at step 7: a retry can't help"),
        ("lost", [requeued("lost", 7), requeued("lost", 7)], True, "3 of cluster.max_requeues.lost=10"),
        ("signal", [requeued("signal", 7)] * 5, True, "6 of cluster.max_requeues.signal=100"),
        ("not_finite", [], True, "1 of"),
        ("not_finite", [requeued("not_finite", 7)], False, "the same failure twice at step 7"),
        ("misconfigured", [], False, "a retry can't help"),
        ("disk_full", [], False, "a retry can't help"),
    ],
)
def test_policy(cause: str, earlier: list[dict[str, Any]], requeue: bool, why: str) -> None:
    decided, reason = decide(Death(cause, 7, "error"), earlier, BUDGETS)
    assert decided is requeue and why in reason
