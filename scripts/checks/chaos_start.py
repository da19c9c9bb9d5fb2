"""`sft` in processes that start in a fraction of a second, and what is planted in them.

Each is forked from a server that has imported what takes seconds (tests/warm.py), and calls the command line as a user
does; so does the process by which an export is verified. Ranks are started by hand, as a cluster does.
"""

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from importlib import import_module
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from warm import LOCK, PROCESSES, enter, free_port, python

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "fcntl.flock")
LEFT = 75.0  # seconds for the other ranks to end once one has failed


@dataclass(frozen=True)
class Planted:
    """What happens inside of a rank's process."""

    signal: int = 0  # that it gets
    at: int = 0  # change to the disk, counted from 1: a file opened for writing, flushed, renamed or removed
    slow: float = 0.0  # seconds that each change to the disk takes
    jump: float = 0.0  # of the clock, in seconds
    jump_after: float = 0.0  # seconds
    count: str = ""  # file for the number of changes in all
    fault: str = ""  # MODULE:FUNCTION that is called first: a fault of the project, planted by its tests


@dataclass(frozen=True)
class Ended:
    """How the ranks of a start ended."""

    codes: list[int | None]  # negative: the signal that killed it; None: it did not end
    outputs: list[str]
    seconds: float = 0.0

    @property
    def code(self) -> int | None:
        """Of the start: the first rank's, unless another failed and the first did not."""
        return next((code for code in self.codes if code), self.codes[0])

    @property
    def output(self) -> str:
        return "\n".join(self.outputs)

    @property
    def last(self) -> str:
        """The last line of the output."""
        return (self.output.strip().splitlines() or ["nothing said"])[-1][:300]


@dataclass
class Start:
    """A command under way, on `num_ranks` ranks."""

    folder: Path
    arguments: list[str]
    num_ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    planted: dict[int, Planted] = field(default_factory=dict)  # by rank

    def __post_init__(self) -> None:
        self.begun = time.monotonic()
        self.logs = [self.folder / f"output-{time.monotonic_ns()}-{rank}.txt" for rank in range(self.num_ranks)]
        (self.folder / "tmp").mkdir(exist_ok=True)
        own = {"HOME": str(self.folder), "TMPDIR": str(self.folder / "tmp"), "PWD": str(self.folder)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.children, pipes = [], []
        for rank, log in enumerate(self.logs):
            place = {"WORLD_SIZE": self.num_ranks, "RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0}
            ranks = address | {name: str(value) for name, value in place.items()} if self.num_ranks > 1 else address
            environment = {**os.environ, **own, **ranks, **self.environment}
            pipe, there = PROCESSES.Pipe(duplex=False)
            given = (
                python().executable,
                environment,
                str(self.folder),
                str(log),
                self.arguments,
                self.planted.get(rank, Planted()),
                there,
            )
            child = PROCESSES.Process(target=_main, args=given)
            with LOCK:
                child.start()
            there.close()
            self.children.append(child)
            pipes.append(pipe)
        for pipe in pipes:  # from then on the command is at work, and its time runs
            with suppress(EOFError):
                pipe.recv()
            pipe.close()
        self.begun = time.monotonic()

    def signal(self, number: int, ranks: list[int]) -> bool:
        """Sends a signal to ranks; whether each of them was still there."""
        there = self.running()
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(self.children[rank].pid, number)
        return there

    def running(self) -> bool:
        return not wait([child.sentinel for child in self.children], 0)

    def wait(self, seconds: float) -> Ended:
        """Until all have ended or `seconds` are over; the ranks that one has left alone have `LEFT` seconds. None is
        left afterwards, nor what they have started."""
        deadline, waiting = self.begun + seconds, list(self.children)
        while waiting and (left := deadline - time.monotonic()) > 0:
            ended = wait([child.sentinel for child in waiting], left)
            waiting = [child for child in waiting if child.sentinel not in ended]
            if ended:
                deadline = min(deadline, time.monotonic() + LEFT)
        codes = []
        for child in self.children:
            late = child in waiting
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
            wait([child.sentinel])
            with LOCK:
                codes.append(None if late else child.exitcode)
        texts = [log.read_text(errors="replace") if log.exists() else "" for log in self.logs]
        return Ended(codes, texts, time.monotonic() - self.begun)


def _main(
    executable: str,
    environment: dict[str, str],
    folder: str,
    log: str,
    arguments: list[str],
    planted: Planted,
    ready: Connection,
) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    enter(executable, folder, environment)
    from sft import cli

    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    plant(planted, folder)
    sys.argv = [str(Path(executable).with_name("sft")), *arguments]
    ready.send(True)
    ready.close()
    cli.main()


def plant(planted: Planted, folder: str) -> None:
    """Into this process; changes to the disk count below `folder`."""
    if planted.fault:
        module, _, name = planted.fault.partition(":")
        getattr(import_module(module), name)()
    if planted.jump:
        _jump(planted.jump, planted.jump_after)
    count, own = 0, os.getpid()

    def changed() -> None:
        nonlocal count
        count += 1
        if planted.slow:
            time.sleep(planted.slow)
        if planted.count:
            os.pwrite(number, str(count).encode(), 0)
        if count == planted.at:
            os.kill(own, planted.signal)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and os.getpid() == own:
            path = arguments[0]
            text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            if text.startswith(folder) or not text.startswith("/"):
                changed()

    if planted.at or planted.slow or planted.count:
        number = os.open(planted.count, os.O_WRONLY | os.O_CREAT) if planted.count else -1
        sys.addaudithook(hook)
        before = os.fsync

        def fsync(fd: Any) -> None:  # of which Python reports nothing
            before(fd)
            changed()

        os.fsync = fsync


def _jump(seconds: float, after: float) -> None:
    """From `after` seconds on the time of day is another."""
    begun, now, now_ns = time.monotonic(), time.time, time.time_ns

    def off() -> float:
        return seconds if time.monotonic() - begun >= after else 0.0

    class Jumped(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.fromtimestamp(time.time(), tz)

    time.time = lambda: now() + off()
    time.time_ns = lambda: now_ns() + int(off() * 1e9)
    for name, module in list(sys.modules.items()):
        if name.startswith("sft.") and getattr(module, "datetime", None) is datetime:
            module.datetime = Jumped  # type: ignore[attr-defined]
