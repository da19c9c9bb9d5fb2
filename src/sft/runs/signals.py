"""What stops a run before its end: SIGUSR1 and SIGTERM, by which a scheduler announces that a job's time is up;
`max_time`, by which a user does; Ctrl-C (SIGINT) and a terminal that is closed (SIGHUP).

The handlers only remember the signal. At the end of each optimizer step the ranks agree whether any has received one,
or its time is up; then a checkpoint is saved and the run ends; the same command resumes it. Ctrl-C and SIGHUP end a
command at once while there is no step to save, and when they come a second time. This module imports nothing heavy, so
that the handlers are installed before anything else is imported.
"""

import errno
import math
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from sft.errors import UserError

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # a scheduler's
BY_HAND = (signal.SIGINT, signal.SIGHUP)  # a user's
EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_CODE_BY_HAND = 130  # as shells report Ctrl-C
# The reasons to stop, numbered from 1 on: the ranks agree on the largest, a scheduler's signal
# outranks the others, and only the lost run is not saved.
NAMES = ("max_time", "Timer", "SIGHUP", "Ctrl-C", "SIGUSR1", "SIGTERM", "the loss of the run to another process")
MAX_TIME, TIMER, SIGHUP, SIGINT, SIGUSR1, SIGTERM, LOST = range(1, 8)
REASON = {
    signal.SIGHUP: SIGHUP,
    signal.SIGINT: SIGINT,
    signal.SIGUSR1: SIGUSR1,
    signal.SIGTERM: SIGTERM,
}
ONCE = 1.0  # seconds: a launcher passes on to its ranks what the terminal has sent them, too

_received = 0
_saves, _by_hand_at = False, -math.inf
_started, _deadline = 0.0, math.inf  # of time.monotonic()


class Interrupted(Exception):
    """A signal or the time stopped the run, which can be resumed. `exit_code` is that of the first rank's process, the
    others end with 0: launchers take anything else for a failure and kill the first rank, still busy."""

    def __init__(self, reason: int, step: int, first_rank: bool = True) -> None:
        super().__init__(f"stopped by {name(reason)} after step {step}: the same command resumes it")
        self.by_signal = reason in (SIGUSR1, SIGTERM)
        self.by_hand = reason in (SIGINT, SIGHUP)
        self.exit_code = (EXIT_CODE_BY_HAND if self.by_hand else EXIT_CODE) if first_rank else 0


def name(reason: int) -> str:
    """Of a reason to stop."""
    return NAMES[reason - 1]


def install() -> None:
    """From now on this process remembers the signals, and its time runs. Processes forked from it ignore SIGUSR1 and
    obey the others, by which they are stopped. Ctrl-C and SIGHUP stay ignored where they are, as under nohup."""
    global _received, _saves, _by_hand_at, _started, _deadline
    _received, own = 0, os.getpid()
    _saves, _by_hand_at = False, -math.inf
    _started, _deadline = time.monotonic(), math.inf

    def remember(number: int, frame: FrameType | None) -> None:
        global _received
        if os.getpid() == own:
            _received = REASON[signal.Signals(number)]
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def ask(number: int, frame: FrameType | None) -> None:
        global _received, _by_hand_at
        before, _by_hand_at = _by_hand_at, time.monotonic()
        if os.getpid() == own:
            _leave_closed_terminal()
            if _by_hand_at - before < ONCE:
                return
            if _saves and before == -math.inf:
                _received = _received or REASON[signal.Signals(number)]
                if all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
                    os.write(2, b"\nsft: saves at the end of this step and stops; Ctrl-C again: stops at once\n")
                return
        raise KeyboardInterrupt

    for number in SIGNALS:
        signal.signal(number, remember)
    for number in BY_HAND:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, ask)


def _leave_closed_terminal() -> None:
    """Whatever is printed to a terminal that is gone would fail, and the save with it."""
    for descriptor in (1, 2):
        try:
            os.get_terminal_size(descriptor)
        except OSError as error:
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def save_first(saves: bool) -> None:
    """From now on there are steps to save, so that Ctrl-C and SIGHUP wait for the end of one; or there are none."""
    global _saves
    _saves = saves


def stop_after(seconds: float) -> None:
    """The time is up so long after `install`."""
    global _deadline
    _deadline = _started + seconds


def received() -> int:
    """The reason to stop that this process has received, MAX_TIME if its time is up, 0 for neither."""
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
