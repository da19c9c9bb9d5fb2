"""One process trains a run at a time, whatever machine it is on and whatever its clock says."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest

from sft.errors import UserError
from sft.runs import lease
from sft.runs.process import live_process, machine
from sft.runs.results import state
from sft.runs.run import Run


@pytest.fixture(autouse=True)
def gives_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    yield
    lease.give_back()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def never(seconds: float) -> None:
    raise AssertionError("waits")


def leave(folder: Path, number: int = 1, **changes: object) -> Path:
    """A lease of another machine's process."""
    owner: dict[str, object] = {
        "owner": "first", "host": "n7", "machine": "m7", "pid": 17, "process": "m7 17", "cluster": None,
        "begun": "2031-01-01T00:00:00Z", "seconds": 7200.0, "ended": False,
    }  # fmt: skip
    path = folder / f"{lease.NAME}{number}"
    path.write_text(json.dumps(owner | changes))
    return path


def beating(path: Path, seconds: float) -> Callable[[float], None]:
    """Its owner's heartbeat at the fourth look."""
    looks = []

    def sleep(_: float) -> None:
        looks.append(_)
        if len(looks) == 4:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": seconds}))

    return sleep


def contend(folder: str, barrier: Barrier, answers: Any) -> None:
    barrier.wait()
    try:
        lease.take(Path(folder), sleep=lambda _: None)
        answers.put(None)
    except UserError as error:
        answers.put(str(error))
    barrier.wait()


@pytest.mark.parametrize("left", [None, {"ended": True}, {}, {"torn": True}], ids=str)
def test_of_those_that_start_in_the_same_moment_one_wins(folder: Path, left: dict[str, bool] | None) -> None:
    num, context = 8, multiprocessing.get_context("fork")
    for turn in range(5):
        place = folder / str(turn)
        place.mkdir()
        if left is not None:
            path = leave(place, 3, **left)
            path.write_text("" if "torn" in left else path.read_text())
        barrier, answers = context.Barrier(num), context.Queue()
        processes = [context.Process(target=contend, args=(str(place), barrier, answers)) for _ in range(num)]
        for process in processes:
            process.start()
        refused = sorted([answers.get(timeout=60) for _ in processes], key=bool)
        for process in processes:
            process.join()
        assert [bool(error) for error in refused] == [False] + [True] * (num - 1)
        assert all(f"on {socket.gethostname()}" in error for error in refused[1:])
        assert [path.name for path in place.iterdir()] == [f"{lease.NAME}{1 if left is None else 4}"]


def test_owner_on_another_machine_is_named_with_its_age(folder: Path) -> None:
    path = leave(folder)
    with pytest.raises(UserError, match=r"run is being trained by process 17 on n7, for 2 h: wait for it or stop it"):
        lease.take(folder, sleep=beating(path, 7205.0))
    with pytest.raises(UserError, match="on n7"):  # whose clock was set back
        lease.take(folder, sleep=beating(path, 3.0))
    assert path.exists()


def test_what_a_crash_left_is_taken_over_by_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    looks: list[float] = []
    leave(folder)
    lease.take(folder, sleep=looks.append)
    assert sum(looks) == lease.LOOKS
    assert "run may still be trained by process 17 on n7, for 2 h: watching" in capsys.readouterr().out
    assert [path.name for path in folder.iterdir()] == [f"{lease.NAME}2"]


def dies(folder: str) -> None:
    lease.take(Path(folder))
    os.kill(os.getpid(), signal.SIGKILL)


def test_after_a_crash_on_this_machine_nobody_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = multiprocessing.get_context("fork").Process(target=dies, args=(str(folder),))
    process.start()
    process.join()
    monkeypatch.setattr(socket, "gethostname", lambda: "renamed-meanwhile")
    lease.take(folder, sleep=never)
    assert not lease.is_lost()


def test_lease_that_is_damaged_is_watched(folder: Path) -> None:
    for content in ("", "[]", "{", '{"owner": 3}'):
        lease.give_back()
        number = lease.newest(folder)
        leave(folder, (number.number if number else 0) + 1).write_text(content)
        looks: list[float] = []
        lease.take(folder, sleep=looks.append)
        assert sum(looks) == lease.LOOKS


@pytest.mark.parametrize(
    ("restart", "job", "cluster", "waits"), [(1, 5, "c", 0), (0, 5, "c", 60), (1, 6, "c", 60), (1, 5, "d", 60)]
)
def test_requeued_job_takes_over_from_itself(
    folder: Path, restart: int, job: int, cluster: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("JOB_ID", 5), ("RESTART_COUNT", restart), ("CLUSTER_NAME", "c")):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    leave(folder, job=job, restart=0, cluster=cluster)
    looks: list[float] = []
    lease.take(folder, sleep=looks.append)
    assert sum(looks) == waits


def another_takes_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a process on another machine does while this one stands still."""
    assert lease._held
    monkeypatch.setattr(lease._held, "renewed", lease._held.renewed - 60)
    return leave(folder, lease._held.number + 1, host="n8")


def test_owner_notices_that_it_has_lost_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.take(folder)
    lease.check()
    path = another_takes_over(folder, monkeypatch)
    before = path.read_text()
    assert lease.is_lost()
    with pytest.raises(lease.Lost, match=r"run was taken over by process 17 on n8.*writes nothing more"):
        lease.check()
    lease.give_back()
    assert path.read_text() == before


def test_removed_folder_is_lost_too(folder: Path) -> None:
    lease.take(folder)
    next(folder.iterdir()).unlink()
    with pytest.raises(lease.Lost, match="was removed"):
        lease.check()
    leave(folder)  # begun anew by another
    with pytest.raises(lease.Lost, match="n7"):
        lease.check()


def test_run_that_was_trained_meanwhile_is_read_again(folder: Path) -> None:
    seen = lease.look(folder)
    path = leave(folder, ended=True)
    with pytest.raises(UserError, match="start it again"):
        lease.take(folder, seen)
    path.write_text(path.read_text().replace("true", "false"))
    lease.take(folder, lease.look(folder), sleep=lambda _: None)


def test_process_of_this_machine_is_refused_at_once(folder: Path) -> None:
    lease.take(folder)
    with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}, for 0 min"):
        lease.look(folder)


def test_attempt_leaves_a_lost_run_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path / "run")
    for ends in (None, RuntimeError("of the folder, which is another's"), UserError("mistake")):
        before = {}
        with pytest.raises((lease.Lost, RuntimeError, UserError)), run.attempt({}, {}, 9, main=True):  # noqa: PT012
            path = another_takes_over(run.folder, monkeypatch)
            before = {file: file.read_bytes() for file in run.folder.iterdir()}
            if ends:
                raise ends
        assert {file: file.read_bytes() for file in run.folder.iterdir()} == before
        path.write_text(path.read_text().replace("false", "true"))


def test_state_of_a_run_is_that_of_its_owner(folder: Path) -> None:
    run = Run(folder)
    with subprocess.Popen(["sleep", "1000"]) as process:
        status = {"state": "running", "host": socket.gethostname(), "pid": process.pid, "process": "an older boot"}
        (folder / "status.json").write_text(json.dumps(status))
        leave(folder, machine=machine(), pid=process.pid, process=live_process(process.pid))
        assert state(run) == "running"
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert state(run) == "suspended"
        process.kill()
        process.wait()
        assert state(run) == "died"


@pytest.mark.parametrize(("minutes", "expected"), [(1, "running"), (5, "silent 5 min")])
def test_owner_on_another_machine_is_silent_without_a_heartbeat(folder: Path, minutes: int, expected: str) -> None:
    """Though a rank may hang for `cluster.hang_after`, its lease would be renewed."""
    status = {"state": "running", "host": "n7", "pid": 17, "process": "m7 17"}
    (folder / "status.json").write_text(json.dumps(status))
    (folder / "config.yaml").write_text("cluster: {hang_after: 7200}")
    for path in (leave(folder), folder / "status.json"):
        os.utime(path, (time.time() - 60 * minutes,) * 2)
    assert state(Run(folder)) == expected
