"""What becomes of SIGUSR1 and SIGTERM, by which a scheduler says that a job's time is up.

The handler only remembers the signal. At the end of each optimizer step the ranks agree whether any has got one; then
a checkpoint is saved and the run ends, to be gone on with by the same command. Nothing heavy is imported here, so that
the handler is there before anything else is.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import lightning as L

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
def shielded() -> Iterator[None]:
    """Processes started inside never get these signals, which schedulers send to all of a job's: they would die of
    them. This one gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def keep_handlers(trainer: "L.Trainer") -> None:
    """Keeps Lightning from putting handlers of its own in their place: on SIGTERM it would broadcast in the handler,
    in the middle of whatever collective is under way, and end the run without a checkpoint."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]


def agreed(trainer: "L.Trainer") -> int:
    """The signal that some rank has got, 0 for none: the same on all ranks, at the price of one tiny all-reduce."""
    if trainer.world_size == 1:
        return _received
    import torch

    received = torch.tensor(_received, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(received, reduce_op="max"))


def interrupt(trainer: "L.Trainer", number: int) -> NoReturn:
    """Ends the run on all ranks, once its checkpoint is saved."""
    from sft.training.log import log

    # Others end with 0: launchers take anything else for a failure and kill the first rank, which isn't done yet.
    code = EXIT_CODE if trainer.is_global_zero else 0
    interrupted = Interrupted(signal.Signals(number).name, trainer.global_step, code)
    log(str(interrupted))
    raise interrupted
