"""A rank that dies before training begins ends the others of its machine, with its cause."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from sft import cli
from sft.runs import signals, startup
from warm import free_port

RANK = """
import sys, time
from sft.runs import startup
rank = int(sys.argv[1])
startup.join(rank)
startup.begin(2, launched=True)
while not rank and 1 not in startup._connections: time.sleep(0.01)
print(flush=True)
for line in sys.stdin:
    exec(line)
"""
WAIT = "import time; print(flush=True); time.sleep(600)\n"  # as in a library


def start(code: str, rank: int, port: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(rank)],
        env={name: value for name, value in os.environ.items() if name != "SFT_START"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen[str]]]:
    port = free_port()
    started = [start(RANK, rank, port) for rank in range(2)]
    for each in started:
        assert each.stdout
        each.stdout.readline()
    yield started
    for each in started:
        each.kill()
        each.communicate()


def do(rank: subprocess.Popen[str], line: str) -> None:
    assert rank.stdin and rank.stdout
    rank.stdin.write(line)
    rank.stdin.flush()
    if line == WAIT:
        rank.stdout.readline()


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(ranks: list[subprocess.Popen[str]], dies: int) -> None:
    other = ranks[1 - dies]
    do(other, WAIT)
    ranks[dies].kill()
    _, said = other.communicate(timeout=30)
    assert (other.returncode, said) == (1, f"sft: rank {dies} was killed, or crashed, before training began\n")


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_fails_says_why(ranks: list[subprocess.Popen[str]], dies: int) -> None:
    other = ranks[1 - dies]
    do(other, WAIT)
    do(ranks[dies], "startup.tell('rows.jsonl is no data', 2); sys.exit(2)\n")
    _, said = other.communicate(timeout=30)
    assert (other.returncode, said) == (2, f"sft: rank {dies}: rows.jsonl is no data\n")


@pytest.mark.parametrize("leaves", [0, 1])
def test_a_rank_that_has_begun_to_train_is_no_others_end(ranks: list[subprocess.Popen[str]], leaves: int) -> None:
    other = ranks[1 - leaves]
    do(ranks[leaves], "startup.leave(); print(flush=True); time.sleep(600)\n")
    assert ranks[leaves].stdout
    ranks[leaves].stdout.readline()
    ranks[leaves].kill()
    ranks[leaves].wait()
    do(other, "time.sleep(startup.GRACE + 1); sys.exit(7)\n")
    _, said = other.communicate(timeout=30)
    assert (other.returncode, said) == (7, "")


def test_who_has_begun_to_train_looks_at_no_end(ranks: list[subprocess.Popen[str]]) -> None:
    trains, other = ranks[1], ranks[0]
    do(trains, "startup.leave(); print(flush=True); time.sleep(2); sys.exit(7)\n")
    assert trains.stdout
    trains.stdout.readline()
    other.kill()
    _, said = trains.communicate(timeout=30)
    assert (trains.returncode, said) == (7, "")


def test_a_rank_that_fails_before_the_first_is_there_waits_to_say_why() -> None:
    port = free_port()
    code = "from sft.runs import startup; startup.TOGETHER = 100; startup.join(1); startup.tell('interrupted', 130)"
    early = start(code, 1, port)
    time.sleep(2)
    assert early.poll() is None
    first = start("import time; from sft.runs import startup; startup.join(0); time.sleep(60)", 0, port)
    _, said = first.communicate(timeout=30)
    assert (first.returncode, said) == (130, "sft: rank 1: interrupted\n")
    assert early.communicate(timeout=30) == ("", "") and early.returncode == 0


def test_two_jobs_on_a_node_have_a_place_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ranks that srun starts without an address, whose launch has one."""
    places = []
    monkeypatch.setattr(cli, "_run", lambda *_: None)
    monkeypatch.setattr(startup, "join", lambda rank, environment: places.append((rank, environment["MASTER_PORT"])))
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "2"}
    step |= {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "0"}
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(signals, "install", lambda: None)
    for job, rank in ((7, 0), (7, 1), (8, 0)):
        of_rank = {"SLURM_JOB_ID": str(job), "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        for name, value in (step | of_rank).items():
            monkeypatch.setenv(name, value)
        cli._start("train", [])
    (first, one), (second, same), (third, other) = places
    assert (first, second, third) == (0, 1, 0)
    assert one == same != other
