"""A rank that hangs is ended with its stacks; one that was suspended is not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sft.runs.process import live_process

HANG_AFTER = 3.0
RANK = """
import ctypes, signal, sys, time
from pathlib import Path
from sft.runs import watchdog

def works():
    print("works", flush=True)
    while not Path(sys.argv[1]).exists():
        time.sleep(0.05)

def hangs_in_python():
    time.sleep(1000)

def hangs_in_native_code():
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # for ever, and never releases the interpreter

watchdog.start(Path(sys.argv[2]), float(sys.argv[4]))
watchdog.beat(7)
globals()[sys.argv[3]]()
watchdog.stop()
"""


def rank(folder: Path, does: str, hang_after: float) -> "subprocess.Popen[str]":
    """A process under watch, the leader of its group."""
    arguments = (str(folder / "enough"), str(folder / "logs" / "stack"), does, str(hang_after))
    return subprocess.Popen(
        [sys.executable, "-c", RANK, *arguments], stdout=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.parametrize("does", ["hangs_in_python", "hangs_in_native_code"])
def test_rank_that_hangs_leaves_its_stack(does: str, tmp_path: Path) -> None:
    with rank(tmp_path, does, 1.0) as process:
        assert process.wait(60) == -signal.SIGALRM
        assert f"in {does}" in (tmp_path / "logs" / "stack").read_text()


@pytest.mark.parametrize("whole_group", [False, True])
def test_rank_that_was_suspended_goes_on(whole_group: bool, tmp_path: Path) -> None:
    """Alone, as by SIGSTOP, or with all processes of its job, as by scontrol suspend or in a machine's sleep."""
    with rank(tmp_path, "works", HANG_AFTER) as process:
        assert process.stdout
        process.stdout.readline()
        kill = os.killpg if whole_group else os.kill
        kill(process.pid, signal.SIGSTOP)
        time.sleep(1.5 * HANG_AFTER)
        kill(process.pid, signal.SIGCONT)
        (tmp_path / "enough").touch()
        assert process.wait(60) == 0
        assert not (tmp_path / "logs").exists()


def test_watcher_ends_with_its_rank(tmp_path: Path) -> None:
    with rank(tmp_path, "works", HANG_AFTER) as process:
        assert process.stdout
        process.stdout.readline()
        (watcher,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        process.kill()
        process.wait()
        end = time.monotonic() + 60
        while live_process(watcher):
            assert time.monotonic() < end
            time.sleep(0.05)
