"""SIGUSR1 and SIGTERM, by which a scheduler announces that a job's time is up.

The handler only remembers the signal. At the end of each optimizer step the ranks agree whether any has received one;
then a checkpoint is saved and the run ends; the same command resumes it. This module imports nothing heavy, so that
the handler is installed before anything else is imported.
"""

import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later

_received = 0


class Interrupted(Exception):
    """A signal stopped the run, which can be resumed. `exit_code` is that of this process."""

    def __init__(self, name: str, step: int, exit_code: int) -> None:
        super().__init__(f"stopped by {name} after step {step}: the same command resumes it")
        self.exit_code = exit_code


def install() -> None:
    """From now on this process remembers the signals. Processes forked from it ignore SIGUSR1 and obey SIGTERM, by
    which they are stopped."""
    global _received
    _received, own = 0, os.getpid()

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() == own:
            _received = number
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in SIGNALS:
        signal.signal(number, remember)


def received() -> int:
    """The signal that this process has received, 0 for none."""
    return _received


@contextmanager
def shielded(signals: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Processes started inside never receive these signals: a scheduler sends them to all processes of a job, and a
    child would die of them. This process receives them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
