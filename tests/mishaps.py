"""What happens to a process that trains: callbacks, planted by `+callbacks.NAME={_target_: mishaps....}`, and
functions that it calls before anything else."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer

from sft.checkpoint import checkpoint, safetensors_file, save
from sft.data import staging
from sft.runs import lease, signals
from sft.runs.metrics_file import Metrics
from sft.training.checkpointing import Checkpoints
from sft.training.module import SFTModule


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
    """`kill`, `hang`, `memory`, `spoil` (the weights) or `raise` on one rank or, with None, on all; with a path, only
    where it isn't yet."""

    def __init__(self, step: int, rank: int | None, what: str, once: str | None = None) -> None:
        super().__init__(step)
        self.rank, self.what, self.once = rank, what, once and Path(once)

    def act(self, trainer: L.Trainer) -> None:
        if self.rank not in (trainer.global_rank, None) or (self.once and self.once.exists()):
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


class TakenOver(AtStep):
    """A process on another machine takes the run over, as while this one is suspended."""

    def __init__(self, step: int, folder: str) -> None:
        super().__init__(step)
        self.folder = Path(folder)

    def act(self, trainer: L.Trainer) -> None:
        held = lease.newest(self.folder)
        assert held and held.owner and lease._held
        another = {**held.owner, "owner": "another", "host": "n8", "machine": "n8", "pid": 1}
        (self.folder / f"{lease.NAME}{held.number + 1}").write_text(json.dumps(another))
        lease._held.renewed -= 60


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


class TimeIsUp(AtStep):
    """Its time is up for this rank: that of `max_time`, and that of Lightning's timers."""

    def __init__(self, step: int, rank: int = 0) -> None:
        super().__init__(step)
        self.rank = rank

    def act(self, trainer: L.Trainer) -> None:
        if trainer.global_rank == self.rank:
            signals._deadline -= 1e6
            for timer in trainer.callbacks:
                if isinstance(timer, Timer):
                    timer._start_time["train"] -= 1e6


class StopsAtOnce(Callback):
    """Ends the run before its first step."""

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        trainer.should_stop = True


class StopsIn(Callback):
    """Ends the run in micro-batch `number`, counted from 1."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.number - 1:
            trainer.should_stop = True


class Losses(Callback):
    """The validation after a step comes out as `of` says."""

    def __init__(self, of: dict[int, float]) -> None:
        self.of = {int(step): loss for step, loss in of.items()}

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        module.val_loss = self.of[trainer.global_step]
        module.val_losses = {"val/loss": module.val_loss}

    def on_validation_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        losses = {"val/loss": self.of[trainer.global_step]}
        module.log_dict = lambda values, **options: type(module).log_dict(module, losses, **options)


class InValidation(Callback):
    """Gets SIGUSR1, or its time is up, in the validation after optimizer step `step`; once."""

    def __init__(self, step: int, once: str, time: bool = False) -> None:
        self.step, self.once, self.time = step, Path(once), time

    def on_validation_batch_start(self, trainer: L.Trainer, *batch: Any) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.once.exists():
            self.once.touch()
            if self.time:
                signals._deadline -= 1e6
            else:
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


def signal_at(
    owner: Any,
    function: Callable[..., Any],
    call: int,
    number: int = signal.SIGKILL,
    *,
    after: bool = False,
    where: Callable[..., bool] = lambda *_, **__: True,
) -> None:
    """From now on this process gets a signal at the `call`th call of a function of this module or class: before it
    does anything, or after it has returned. Calls whose arguments aren't `where` don't count. SIGKILL is the kernel's:
    no `finally` runs."""
    name, count = function.__name__, 0
    assert getattr(owner, name) is function

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += where(*args, **kwargs)
        if count == call and not after:
            os.kill(os.getpid(), number)
        result = function(*args, **kwargs)
        if count == call and after:
            os.kill(os.getpid(), number)
        return result

    setattr(owner, name, counted)


def killed_in_a_step() -> None:
    """Between backward and the optimizer's step of the 4th step."""
    signal_at(SFTModule, SFTModule.configure_gradient_clipping, 4)


def killed_in_a_save() -> None:
    """The 2nd: weights and the optimizer's state are written, what belongs to them is not."""
    signal_at(safetensors_file, safetensors_file.write, 2, after=True)


def killed_before_a_rename() -> None:
    """The 2nd checkpoint is written, its name is not there yet."""
    signal_at(save, save.flush, 3, after=True)


def killed_in_a_removal() -> None:
    signal_at(checkpoint, checkpoint.remove, 1)


def killed_in_the_metrics() -> None:
    """With the validation after the 4th step in it, the file lies beside its place."""

    def has_it(source: Path, target: Path) -> bool:
        last = Metrics.read(source).rows[-1:] if target.name == "metrics.csv" else []
        return bool(last) and last[0]["step"] == "4" and bool(last[0]["val/loss"])

    signal_at(os, os.replace, 1, where=has_it)


def killed_in_the_store() -> None:
    """Of the store's files one is on the disk."""
    signal_at(staging, staging.fsync, 2)


def killed_in_the_export() -> None:
    """It is proven, and not in its place."""
    signal_at(Path, Path.rename, 1, where=lambda path, target: path.name.endswith(".unverified"))


def killed_before_the_first_step() -> None:
    signal_at(Checkpoints, Checkpoints.on_train_batch_start, 1)


def stopped_in_the_imports(number: int) -> None:
    """As soon as the command line remembers signals, and before it has imported what takes long."""
    signal_at(signals, signals.install, 1, number, after=True)


def signals_to_a_fork() -> None:
    """Of a process that remembers signals: it ignores SIGUSR1 and dies of SIGTERM."""
    signals.install()
    ready, there = os.pipe()
    child = os.fork()
    if not child:
        os.write(there, b".")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, signal.SIGUSR1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM


def starts_by(executable: str) -> None:
    """Whatever Python this process starts."""
    sys.executable = executable
