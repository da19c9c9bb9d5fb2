"""Runs of `sft` in a folder of their own, on a model that trains in a second."""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from time import monotonic

import pytest

import warm
from sft import cli
from sft.runs import signals
from warm import LOCK, PROCESSES, enter, free_port, python

Before = Callable[[], None] | None  # importable, since it is called in another process


@dataclass
class Ended:
    code: int  # negative: the signal that killed it
    output: str


class Sft:
    """Calls the command line in `folder`, in this process (fast) or in one of its own (to be killed)."""

    def __init__(self, folder: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        warm.start()
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.delenv("SFT_CACHE", raising=False)
        # 60 rows, 3 of them held out, 11 packs: 3 steps an epoch, the last of 3 packs instead of 4.
        self.settings = [
            f"model.path={model}",
            f"data.path={data}",
            "data.max_length=256",
            "data.num_workers=1",
            "global_batch_size=4",
            "micro_batch_size=2",
            "optimizer.lr=1e-2",
            "trainer=cpu",
            "logger=csv",
            "evaluation.samples=0",  # tests of their own ask for answers
        ]

    def __call__(self, command: str, *arguments: str) -> int:
        """Exit code of `sft COMMAND ARGUMENTS`, run here."""
        # A run's watchdog takes the signal by which pytest ends a test.
        left, begun = signal.setitimer(signal.ITIMER_REAL, 0)[0], monotonic()
        numbers = (*signals.SIGNALS, *signals.BY_HAND, signal.SIGALRM)
        handlers = {number: signal.getsignal(number) for number in numbers}
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["sft", command, *arguments])
            patch.setattr(sys, "executable", python().executable)
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                if left:
                    signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (monotonic() - begun)))
        return 0

    def train(self, *arguments: str) -> int:
        return self("train", *self.settings, *arguments)

    def process(self, *arguments: str, before: Before = None) -> Ended:
        """The same in a process of its own, after a call of `before`. Further ranks are started by Lightning."""
        (ended,) = self._started([{"MASTER_PORT": str(free_port())}], before, arguments)
        return ended

    def ranks(self, num: int, *arguments: str, before: Before = None, folder: Path | None = None) -> Ended:
        """The same on several ranks, started as a cluster does; what the first of them printed."""
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        places = [
            {**address, "NODE_RANK": "0", "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank), "RANK": str(rank)}
            for rank in range(num)
        ]
        ended = self._started(places, before, (*arguments, f"trainer.devices={num}"), folder)
        codes = {rank.code for rank in ended}
        assert len(codes) == 1, "\n".join(rank.output for rank in ended)
        return ended[0]

    def _started(
        self, places: list[dict[str, str]], before: Before, arguments: tuple[str, ...], folder: Path | None = None
    ) -> list[Ended]:
        command = [python().script, *arguments]
        here = (python().executable, str(folder or self.folder))
        outputs = [self.folder / f"output{number}.txt" for number in range(len(places))]
        children = [
            PROCESSES.Process(target=_main, args=(*here, os.environ | place, str(output), before, command))
            for place, output in zip(places, outputs, strict=True)
        ]
        try:
            for child in children:
                with LOCK:
                    child.start()
            _wait(children)
        finally:  # none outlives the test, whatever becomes of it, nor what they have started
            for child in children:
                if child.pid:
                    with suppress(ProcessLookupError):
                        os.killpg(child.pid, signal.SIGKILL)
                    child.kill()
                    child.join()
        return [Ended(child.exitcode, output.read_text()) for child, output in zip(children, outputs, strict=True)]

    def run_folder(self, name: str = "run") -> Path:
        return self.folder / "runs" / name


def _main(
    executable: str, folder: str, environment: dict[str, str], output: str, before: Before, command: list[str]
) -> None:
    os.setsid()
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    enter(executable, folder, environment)
    if before:
        before()
    sys.argv = command
    cli.main()


def _wait(children: list[ForkServerProcess]) -> None:
    """Until all have ended or, where one fails, whose others would wait for it, for 20 seconds more."""
    running = list(children)
    deadline = None
    while running:
        left = None if deadline is None else max(0.0, deadline - monotonic())
        ended = wait([child.sentinel for child in running], left)
        if not ended:
            return
        with LOCK:
            failed = any(child.exitcode for child in running if child.sentinel in ended)
        running = [child for child in running if child.sentinel not in ended]
        if failed and deadline is None:
            deadline = monotonic() + 20
