"""SIGUSR1 and SIGTERM, by which a scheduler announces that a job's time is up, and `max_time`, by which a user does.

The handler only remembers the signal. At the end of each optimizer step the ranks agree whether any has received one,
or its time is up; then a checkpoint is saved and the run ends; the same command resumes it. This module imports nothing
heavy, so that the handler is installed before anything else is imported.
"""

import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from sft.errors import UserError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
# Other reasons to stop, numbered below the signals: the ranks agree on the largest, and only a signal is a scheduler's.
MAX_TIME, TIMER = 1, 2
NAMES = {MAX_TIME: "max_time", TIMER: "Timer"}

_received = 0
_started, _deadline = 0.0, math.inf  # of time.monotonic()


class Interrupted(Exception):
    """A signal or the time stopped the run, which can be resumed. `exit_code` is that of this process."""

    def __init__(self, number: int, step: int, exit_code: int) -> None:
        super().__init__(f"stopped by {name(number)} after step {step}: the same command resumes it")
        self.by_signal = number in SIGNALS
        self.exit_code = exit_code


def name(number: int) -> str:
    """Of a signal, or of another reason to stop."""
    return NAMES.get(number) or signal.Signals(number).name


def install() -> None:
    """From now on this process remembers the signals, and its time runs. Processes forked from it ignore SIGUSR1 and
    obey SIGTERM, by which they are stopped."""
    global _received, _started, _deadline
    _received, own = 0, os.getpid()
    _started, _deadline = time.monotonic(), math.inf

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() == own:
            _received = number
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, remember)


def stop_after(seconds: float) -> None:
    """The time is up so long after `install`."""
    global _deadline
    _deadline = _started + seconds


def received() -> int:
    """The signal that this process has received, MAX_TIME if its time is up, 0 for neither."""
    return _received or (MAX_TIME if time.monotonic() >= _deadline else 0)


def seconds(max_time: object) -> float:
    """Of the setting `max_time`: `hours:minutes:seconds` or `days:hours:minutes:seconds`; infinite for None."""
    if max_time is None:
        return math.inf
    match = re.fullmatch(r"(?:(\d+):)?(\d+):([0-5]\d):([0-5]\d)", str(max_time))
    days, hours, minutes, rest = (int(number or 0) for number in match.groups()) if match else (0, 0, 0, 0)
    if total := ((days * 24 + hours) * 60 + minutes) * 60.0 + rest:
        return total
    raise UserError(
        f"max_time={max_time} is no time: set it like 4:00:00 (hours:minutes:seconds) or 1:12:00:00 (days first); "
        "a YAML file needs quotes around it"
    )


@contextmanager
def shielded(signals: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Processes started inside never receive these signals: a scheduler sends them to all processes of a job, and a
    child would die of them. This process receives them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
