"""The callback that saves checkpoints during `fit` and puts a run back to where one was saved."""

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sft.training import checkpoint as checkpoints
from sft.training import probes
from sft.training.checkpoint import Checkpoint
from sft.training.log import log
from sft.training.saving import save


class Checkpoints(Callback):
    """Saves every `save_every` steps and at the last, after the validation of that step where there is one.

    Args:
        folder: of the checkpoints.
        save_every: optimizer steps.
        val_every: optimizer steps; the last step is always validated.
        keep_last: number of newest checkpoints kept besides the best.
        resume: where to go on from; None: from the start.
        facts: of the run, kept in each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        save_every: int,
        val_every: int,
        keep_last: int,
        resume: Checkpoint | None,
        facts: dict[str, Any],
    ) -> None:
        self.folder, self.save_every, self.val_every = folder, save_every, val_every
        self.keep_last, self.resume, self.facts = keep_last, resume, facts

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            checkpoints.discard_unfinished(self.folder)
        if self.resume is None:
            return
        step = self.resume.step
        self.resume.verify()
        self.resume.restore(module.model, trainer.optimizers[0])
        if hasattr(trainer.strategy, "resumed"):
            trainer.strategy.resumed(step)
        states = self.resume.callbacks()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback.state_key in states:
                callback.load_state_dict(states[callback.state_key])
        # The rate itself came back with the optimizer's groups.
        module.lr_schedulers().last_epoch = step
        # Lightning counts from where the loader starts: tell it how much came before. Its own resume would
        # take these from the checkpoint, where they'd depend on the accumulation of the run that saved.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.ready = step
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        loop._batches_that_stepped = step
        batches: Any = loop.batch_progress.total
        batches.ready = batches.started = batches.processed = batches.completed = step * trainer.accumulate_grad_batches

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        # Lightning validates at multiples of `val_check_batch` only: make the run's last batch one.
        total = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if total == module.num_steps * trainer.accumulate_grad_batches:
            trainer.val_check_batch = total

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if whole_step and not self._validates(trainer, module):
            self._save_if_due(trainer, module, val_loss=None)

    def on_validation_end(self, trainer: L.Trainer, module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save_if_due(trainer, module, val_loss=module.val_loss)

    def _validates(self, trainer: L.Trainer, module: Any) -> bool:
        step = trainer.global_step
        return bool(trainer.enable_validation) and (step % self.val_every == 0 or step == module.num_steps)

    def _save_if_due(self, trainer: L.Trainer, module: Any, val_loss: float | None) -> None:
        step = trainer.global_step
        if step % self.save_every and step != module.num_steps and not trainer.should_stop:
            return
        for logger in trainer.loggers:
            logger.save()
        log_probs = probes.measure(module, trainer.datamodule)  # type: ignore[attr-defined]
        state = {
            "num_steps": module.num_steps,
            "stopped": trainer.should_stop,  # by a callback, before the last step
            "val_loss": val_loss if val_loss is not None and math.isfinite(val_loss) else None,
            **self.facts,
        }
        callbacks = {each.state_key: each.state_dict() for each in trainer.callbacks}  # type: ignore[attr-defined]
        saved = save(
            self.folder,
            step,
            module.model,
            trainer.optimizers[0],
            {key: value for key, value in callbacks.items() if value},
            state,
            log_probs,
        )
        if trainer.is_global_zero:
            checkpoints.prune(self.folder, self.keep_last)
            log(f"step {step}: saved {saved.path}")
        trainer.strategy.barrier("checkpoint")
