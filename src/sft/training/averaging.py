"""Averages of the weights over steps: kept beside the weights, validated, saved and, on request, exported.

An average is one more fp32 tensor for each that the optimizer steps on (see `checkpoint/layout.py`): 4 bytes a
parameter, shared out over the ranks as the optimizer's states are, with nothing gathered. It doesn't change training.
Which steps count is a function of the step, so a resumed run needs nothing but the averages themselves.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from sft.checkpoint.layout import Whole, flat, fp32_like
from sft.data.batch import Batch
from sft.runs import watchdog
from sft.training.log import log
from sft.training.module import SFTModule
from sft.training.strategies import placement

METRIC = "val/loss_average"


@dataclass(eq=False)
class Averaging(Callback):
    """Keeps an average of the weights after each step from `start` on.

    Args:
        rate: how far the average goes towards the weights, of the number of weights that are in it already.
        start: the step whose weights it begins with, 0 for those before training; below 1 a share of the run.
        every: how many steps lie between two of those that count.
        export: whether the run exports it in place of the weights, and takes its validation loss for the best.
    """

    rate: Callable[[int], float]
    start: float
    every: int
    export: bool
    averages: dict[Tensor, Tensor] = field(default_factory=dict)  # by what the optimizer steps on; empty: not begun
    val_loss: float = math.nan  # of the last validation; NaN before it begins

    def on_train_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        if self.first(module.num_steps) == 0 and (left := (1 - self.rate(module.num_steps)) ** module.num_steps) > 0.5:
            log(
                f"averaging: after {module.num_steps} steps {left:.0%} of the average is still the weights before "
                f"training: set averaging.decay={max(0.0, 1 - 10 / module.num_steps):.2g} or less, or averaging.start"
            )
        if trainer.global_step < self.first(module.num_steps):
            self.averages.clear()  # of a run that this one extends
        elif not self.averages:
            self._begin(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: SFTModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        since = trainer.global_step - self.first(module.num_steps)
        if since == 0:
            self._begin(trainer, module)
        elif since > 0 and since % self.every == 0:
            rate = self.rate(since // self.every)
            with torch.no_grad():
                for holder, average in self.averages.items():
                    flat(average).lerp_(flat(holder).float(), rate)

    def first(self, num_steps: int) -> int:
        return round(self.start * num_steps) if self.start < 1 else int(self.start)

    def _begin(self, trainer: L.Trainer, module: SFTModule) -> None:
        for holder in dict.fromkeys(part.holder for part in layout(trainer, module).parts()):
            self.averages[holder] = fp32_like(holder)
            flat(self.averages[holder]).copy_(flat(holder))

    @contextmanager
    def swapped_in(self, trainer: L.Trainer, module: SFTModule) -> Iterator[None]:
        """Inside, the model computes with the average; afterwards with its weights again, to the bit. Takes another
        4 bytes a parameter, shared out over the ranks, for as long."""
        where = layout(trainer, module)

        def put(values: dict[Tensor, Tensor]) -> None:
            with torch.inference_mode(False), torch.no_grad():
                where.parts()  # FSDP2 gives up what it has gathered
                for holder, value in values.items():
                    flat(holder).copy_(flat(value))
                where.publish(None)

        weights = {holder: holder.detach().clone() for holder in self.averages}
        put(self.averages)
        try:
            yield
        finally:
            put(weights)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        self.val_loss = math.nan
        if not self.averages or trainer.sanity_checking:
            return
        of_weights = module._val_sums  # the module has yet to read them
        module.on_validation_epoch_start()
        with self.swapped_in(trainer, module):
            data = trainer.datamodule  # type: ignore[attr-defined]
            for number, loader in enumerate(data.val_dataloader()):
                for index, batch in enumerate(loader):
                    watchdog.beat()
                    with trainer.precision_plugin.val_step_context():
                        module.validation_step(data.transfer_batch_to_device(batch, module.device, 0), index, number)
        sums = trainer.strategy.reduce(module._val_sums.sum(0), reduce_op="sum")
        assert isinstance(sums, Tensor)
        self.val_loss, module._val_sums = float(sums[0] / sums[1]), of_weights
        module.log(METRIC, self.val_loss, logger=False, sync_dist=True)

    def on_validation_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if not math.isnan(self.val_loss):
            for logger in trainer.loggers:
                logger.log_metrics({METRIC: self.val_loss}, step=trainer.global_step)
            log(f"step {trainer.global_step}: validation loss {self.val_loss:.4f} with the average of the weights")


def ema(decay: float, start: float, export: bool) -> Averaging:
    """The exponential moving average: average ← decay · average + (1 − decay) · weights after each step (Polyak and
    Juditsky 1992, as in Adam's section 7.2, arXiv 1412.6980, without its correction of the beginning)."""
    return Averaging(lambda num: 1 - decay, start, 1, export)


def swa(start: float, every: int, export: bool) -> Averaging:
    """The equal average of the weights of every `every`-th step (arXiv 1803.05407)."""
    return Averaging(lambda num: 1 / (num + 1), start, every, export)


def of(trainer: L.Trainer) -> Averaging | None:
    """The run's average, if it keeps one."""
    found = (callback for callback in trainer.callbacks if isinstance(callback, Averaging))  # type: ignore[attr-defined]
    return next(found, None)


def layout(trainer: L.Trainer, module: SFTModule) -> Whole:
    """Where this rank keeps parameters, the optimizer's states and the average."""
    found = placement(trainer.strategy).layout(module.model, trainer.optimizers[0])
    if averaging := of(trainer):
        found.averages = averaging.averages
    return found
