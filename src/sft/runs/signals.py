"""What becomes of SIGUSR1 and SIGTERM, by which a scheduler says that a job's time is up.

The handler only remembers the signal. At the end of each optimizer step the ranks agree whether any has got one; then
a checkpoint is saved and the run ends, to be gone on with by the same command. Nothing heavy is imported here, so that
the handler is there before anything else is.
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
    """The run was stopped by a signal and can go on. `exit_code` is what this process ends with."""

    def __init__(self, name: str, step: int, exit_code: int) -> None:
        super().__init__(f"stopped by {name} after step {step}: the same command goes on")
        self.exit_code = exit_code


def install() -> None:
    """From now on a signal is remembered, by this process alone: those that it forks ignore SIGUSR1 and obey SIGTERM,
    by which they are ended."""
    global _received
    _received, own = 0, os.getpid()

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() == own:
            _received = number
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for each in SIGNALS:
        signal.signal(each, remember)


def received() -> int:
    """The signal that this process has got, 0 for none."""
    return _received


@contextmanager
def shielded(signals: Iterable[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Processes started inside never get these signals, which schedulers send to all processes of a job and of which
    they would die. This process gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
