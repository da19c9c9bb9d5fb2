"""What happens to the ranks of a batch job, planted by `+callbacks.NAME={_target_: mishaps....}`."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sft.runs import signals


class AtStep(Callback):
    """Does something at the start of optimizer step `step`, counted from 1."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0 and trainer.global_step == self.step - 1:
            self.act(trainer)

    def act(self, trainer: L.Trainer) -> None:
        raise NotImplementedError


class Gate(AtStep):
    """Says in the file `PATH.reached` that the step is reached, and goes on when `PATH` is there."""

    def __init__(self, step: int, path: str) -> None:
        super().__init__(step)
        self.path = Path(path)

    def act(self, trainer: L.Trainer) -> None:
        if trainer.is_global_zero:
            self.path.with_name(self.path.name + ".reached").touch()
        while not self.path.exists():
            time.sleep(0.02)


class Mishap(AtStep):
    """`kill`, `hang`, `memory`, `spoil` (the weights) or `raise` on one rank; with a path, only where it isn't yet."""

    def __init__(self, step: int, rank: int, what: str, once: str | None = None) -> None:
        super().__init__(step)
        self.rank, self.what, self.once = rank, what, once and Path(once)

    def act(self, trainer: L.Trainer) -> None:
        if trainer.global_rank != self.rank or (self.once and self.once.exists()):
            return
        if self.once:
            self.once.touch()
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "hang":
            time.sleep(1000)
        elif self.what == "memory":
            raise MemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        elif self.what == "spoil":
            next(iter(trainer.lightning_module.parameters())).data.fill_(float("nan"))
        else:
            raise ArithmeticError(f"the mishap of rank {self.rank}")


class UntilSignal(AtStep):
    """Waits on each rank until it has got a signal; once."""

    def __init__(self, step: int, once: str) -> None:
        super().__init__(step)
        self.once = Path(once)

    def act(self, trainer: L.Trainer) -> None:
        if self.once.exists():
            return
        while not signals.received():
            time.sleep(0.1)
        trainer.strategy.barrier()
        self.once.touch()


class InValidation(Callback):
    """Gets SIGUSR1 in the validation after optimizer step `step`; once."""

    def __init__(self, step: int, once: str) -> None:
        self.step, self.once = step, Path(once)

    def on_validation_batch_start(self, trainer: L.Trainer, *batch: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGUSR1)


class InSave(Callback):
    """Gets SIGUSR1 while the checkpoint of optimizer step `step` is saved; once."""

    def __init__(self, step: int, once: str) -> None:
        self.step, self.once = step, Path(once)
        self.trainer: L.Trainer | None = None

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        if self.trainer and self.trainer.global_step == self.step and not self.once.exists():
            self.once.touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        return {}
