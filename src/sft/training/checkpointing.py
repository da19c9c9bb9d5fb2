"""The callback that saves checkpoints during `fit`, resumes from one, and ends the run on a signal or when its time is
up."""

import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loops.progress import _ProcessedTracker
from torch.optim.lr_scheduler import LambdaLR

from sft.checkpoint import checkpoint as checkpoints
from sft.checkpoint.checkpoint import Checkpoint, Measured
from sft.checkpoint.save import save
from sft.data.batch import Batch
from sft.errors import UserError
from sft.ranks import together
from sft.runs import answers_file, events, lease, saved, signals, startup, watchdog
from sft.runs.manifest import Damaged
from sft.training import averaging, callbacks, early_stopping, probes
from sft.training.averaging import layout
from sft.training.log import log
from sft.training.metrics import StepMetrics
from sft.training.metrics_file import MetricsFile
from sft.training.module import SFTModule


@dataclass(eq=False)
class Checkpoints(Callback):
    """Saves every `save_every` steps, at the last step, and at a step in which a signal came or the time was up; after
    the validation where the step has one. Where the best is exported, each validation that is the lowest so far is
    saved, too. A signal during a validation stops it, and the resumed run begins with it.

    It comes after all other callbacks. One that ends the run in the middle of a step ends it after that step.
    """

    folder: Path  # of the checkpoints; the run's events are recorded beside it
    save_every: int  # optimizer steps
    val_every: int  # optimizer steps; the last step is always validated
    keep_last: int  # number of newest checkpoints kept in addition to the best
    export: str | None  # best or last; None: the best where a callback stops early
    resume: Checkpoint | None  # None: start anew
    facts: dict[str, object]  # about the run, saved in each checkpoint
    extends: bool = False  # the checkpoint is that of another run, which this one extends
    computed_by: Callable[[int], dict[str, object]] = lambda step: {}  # what the event of a start after this step keeps
    check_code: Callable[[str], str | None] = lambda node: None  # of the ranks; what the log should say of it
    timed_out: bool = False  # by a Timer
    stopping: bool = False  # a callback has ended the run in the middle of the step under way
    best: Measured | None = None  # the validation with the lowest loss so far, the earliest of equals

    def setup(self, trainer: L.Trainer, module: SFTModule, stage: str) -> None:
        # Lightning's own handler would broadcast on SIGTERM, in the middle of whatever collective is under way, and
        # end the run without a checkpoint.
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Timer):
                check = partial(self._time, callback._check_time_remaining)
                callback._check_time_remaining = check  # type: ignore[method-assign]

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        if trainer.is_global_zero:
            checkpoints.discard_unfinished(self.folder)
        node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
        group = os.environ.get("GROUP_RANK", "0")  # of the node, by its launcher: two may have one name
        mine = (node, group, trainer.local_rank, self.resume.step if self.resume else 0)
        ranks = together(lambda: mine)
        check_ranks([rank[:3] for rank in ranks], trainer.world_size)
        if trainer.world_size > 1 and (note := self.check_code(node)):
            log(note)
        steps = {node: step for node, _, _, step in ranks}
        if len(set(steps.values())) > 1:
            seen = ", ".join(f"{node}: {step}" for node, step in steps.items())
            raise RuntimeError(f"the ranks see different checkpoints in {self.folder}, of the steps {seen}")
        if self.resume is not None:
            self._resume(trainer, module, self._whole(trainer, self.resume))
        elif module.first_values is not None:
            layout(trainer, module).begin(module.first_values)
            module.first_values = None
        signals.save_first(True)
        if trainer.is_global_zero:
            step, by = trainer.global_step, self.computed_by(trainer.global_step)
            self._record(trainer, "start", step=step, hosts=list(steps), num_ranks=trainer.world_size, **by)
        if number := self._agreed(trainer):  # came before the first step: there is nothing to save yet
            self._interrupt(trainer, number)

    def _time(self, check: Callable[[L.Trainer], None], trainer: L.Trainer) -> None:
        """Lightning's timer would end the run for good: it is only this process whose time is up."""
        if not self.timed_out:
            before = trainer.should_stop
            trainer.should_stop = False
            check(trainer)
            self.timed_out, trainer.should_stop = trainer.should_stop, before

    def _agreed(self, trainer: L.Trainer) -> int:
        """Why some rank has to stop, 0 for no reason: the same on all ranks, by one tiny all-reduce."""
        number = signals.LOST if lease.is_lost() else signals.received() or (signals.TIMER if self.timed_out else 0)
        if trainer.world_size == 1:
            return number
        received = torch.tensor(number, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(received, reduce_op="max"))

    def _record(self, trainer: L.Trainer, event: str, **details: object) -> None:
        if trainer.is_global_zero:
            events.record(self.folder.parent, event, **details)

    def _interrupt(self, trainer: L.Trainer, number: int) -> NoReturn:
        """Ends the run on all ranks, once its checkpoint is saved."""
        step = trainer.global_step
        if number == signals.LOST:
            raise lease.lost(self.folder.parent)
        interrupted = signals.Interrupted(number, step, trainer.is_global_zero)
        if interrupted.by_signal:
            self._record(trainer, "signal", signal=signals.name(number), step=step)
        elif interrupted.by_hand:
            self._record(trainer, "by_hand", why=signals.name(number), step=step)
        else:
            self._record(trainer, "time_up", why=f"{signals.name(number)} is over", step=step)
        log(str(interrupted))
        raise interrupted

    def _whole(self, trainer: L.Trainer, candidate: Checkpoint) -> Checkpoint:
        """The checkpoint, or where a checksum of its files is another, the newest before it that is whole."""
        damaged: dict[Path, str] = {}
        while wrong := candidate.verify():
            watchdog.beat(candidate.step)
            damaged[candidate.path] = wrong[0]
            found = None if self.extends else saved.whole(self.folder, before=candidate.step)[0]
            if found is None:
                raise Damaged(wrong[0], saved.NONE_IS_WHOLE.format(self.folder.parent))
            candidate = Checkpoint(found)
        watchdog.beat(candidate.step)
        if damaged:
            self.resume, step = candidate, candidate.step
            trainer.datamodule.start_step = step  # type: ignore[attr-defined]
            if trainer.is_global_zero:
                put_aside(self.folder.parent, damaged, step)
                answers_file.keep_until(self.folder.parent, step)
            for file in trainer.loggers:
                if isinstance(file, MetricsFile):
                    file.resume(step)
        return candidate

    def _resume(self, trainer: L.Trainer, module: SFTModule, checkpoint: Checkpoint) -> None:
        step = checkpoint.step
        watchdog.beat(step)
        where = layout(trainer, module)
        checkpoint.restore(where, hyperparameters=not self.extends)
        watchdog.beat(step)
        scheduler = trainer.lr_scheduler_configs[0].scheduler
        scheduler.last_epoch = step
        if self.extends:
            assert isinstance(scheduler, LambdaLR)
            for group, peak, factor in zip(
                where.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
            ):
                group["lr"] = peak * factor(step)
            counts = {key: state for key, state in checkpoint.callbacks().items() if key == StepMetrics.__qualname__}
            callbacks.load(trainer, module, counts)  # its steps are this run's, too
        else:  # the rate itself came back with the optimizer's groups
            self.best = checkpoints.measured_best(checkpoint, checkpoints.complete(self.folder))
            callbacks.load(trainer, module, checkpoint.callbacks())
        # Lightning counts from where the loader starts: tell it how much came before. Its own resume would
        # take these from the checkpoint, where they'd depend on the accumulation of the run that saved.
        loop = trainer.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.ready = step
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
        loop._batches_that_stepped = step
        batches = loop.batch_progress.total
        assert isinstance(batches, _ProcessedTracker)
        batches.ready = batches.started = batches.processed = batches.completed = step * trainer.accumulate_grad_batches

    def on_train_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        callbacks.check_states(trainer, module)  # after all others have begun
        startup.leave()
        if self.resume is not None and not self.extends and not self.resume.state.get("validated", True):
            # As Lightning does it between two batches.
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: L.Trainer, module: SFTModule, batch: Batch, batch_idx: int) -> None:
        # Lightning validates at multiples of `val_check_batch` only: make the run's last batch one.
        total = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        if total == module.num_steps * trainer.accumulate_grad_batches:
            trainer.val_check_batch = total

    def on_train_batch_end(
        self, trainer: L.Trainer, module: SFTModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        watchdog.beat(trainer.global_step)
        whole_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        self.stopping |= trainer.should_stop
        trainer.should_stop = self.stopping and whole_step  # in the middle of a step Lightning would validate and end
        if whole_step and not self._validates(trainer, module):
            self._end_step(trainer, module)

    def on_validation_batch_end(self, trainer: L.Trainer, module: SFTModule, *batch: object) -> None:
        watchdog.beat()
        if trainer.state.fn != "fit" or trainer.global_step == module.num_steps:
            return  # after the last step the validation is all that is left
        if number := self._agreed(trainer):
            if not trainer.sanity_checking and number != signals.LOST:
                self._save(trainer, module, validated=False)
            self._interrupt(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._end_step(trainer, module, measured=True)

    def on_fit_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        last = checkpoints.latest(self.folder)
        if last is None or not last.last:
            step = trainer.global_step
            where = f"after step {step}, not at its end" if step else "before its first step"
            raise UserError(
                f"{early_stopping.why(trainer)[1]} {where}: leave the callback out, or have it set trainer.should_stop "
                "in a step"
            )

    def _validates(self, trainer: L.Trainer, module: SFTModule) -> bool:
        step = trainer.global_step
        due = step % self.val_every == 0 or step == module.num_steps or trainer.should_stop
        return bool(trainer.enable_validation) and due

    def _end_step(self, trainer: L.Trainer, module: SFTModule, measured: bool = False) -> None:
        step, number = trainer.global_step, self._agreed(trainer)
        average = averaging.of(trainer)
        loss = average.val_loss if average and average.export else module.val_loss
        new_best = measured and loss < (self.best["val_loss"] if self.best else math.inf)  # NaN isn't
        if new_best:
            self.best = {"step": step, "val_loss": loss}
        exports_best = self.export == "best" or (self.export is None and bool(trainer.early_stopping_callbacks))
        due = step == module.num_steps or step % self.save_every == 0 or (new_best and exports_best)
        if number != signals.LOST and (number or trainer.should_stop or due):
            self._save(trainer, module, measured)
            number = number or self._agreed(trainer)  # may have come during the save
        if number:
            self._interrupt(trainer, number)

    def _save(self, trainer: L.Trainer, module: SFTModule, measured: bool = False, validated: bool = True) -> None:
        """`measured`: the step's validation has just been made; `validated`: it needs none."""
        step, start, stopped = trainer.global_step, time.perf_counter(), trainer.should_stop
        early = stopped and step < module.num_steps
        stopped_by, stopped_early = early_stopping.why(trainer) if early else (None, None)
        watchdog.beat()
        for logger in trainer.loggers:
            logger.save()
        log_probs = {"probes": probes.measure(module, trainer.datamodule)}  # type: ignore[attr-defined]
        average = averaging.of(trainer)
        files = [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]
        if average and average.averages:
            with average.swapped_in(trainer, module):
                log_probs["probes-average"] = probes.measure(module, trainer.datamodule)  # type: ignore[attr-defined]
        state = {
            "num_steps": module.num_steps,
            "stopped": stopped,  # by a callback, before the last step
            "stopped_early": stopped_early,
            "stopped_by": stopped_by,
            "stops_early": bool(trainer.early_stopping_callbacks),
            "best": self.best,
            "val_loss": _finite(module.val_loss) if measured else None,
            "val_loss_average": _finite(average.val_loss) if average and measured else None,
            "exports_average": bool(average and average.export),
            "validated": validated,
            **({"metrics": files[0].metrics.digest(step)} if files else {}),
            **self.facts,
        }
        made = save(
            self.folder,
            step,
            layout(trainer, module),
            callbacks.states(trainer.callbacks, trainer, module),  # type: ignore[attr-defined]
            state,
            log_probs,
        )
        if trainer.is_global_zero:
            checkpoints.prune(self.folder, self.keep_last)
            log(f"step {step}: saved {made.path}")
            if stopped_early:
                log(f"step {step}: stopped early: {stopped_early}")
        self._record(trainer, "save", step=step, seconds=round(time.perf_counter() - start, 3))
        trainer.strategy.barrier("checkpoint")
        watchdog.beat()


def put_aside(run: Path, damaged: Mapping[Path, str], step: int) -> None:
    """Says what is wrong with checkpoints from which a run does not resume, and renames them."""
    for folder, wrong in damaged.items():
        log(f"note: {wrong}: resumes from step {step}, the newest checkpoint that is whole")
        events.record(run, "skipped", step=step, why=wrong)
        saved.set_aside(folder)


def _finite(loss: float) -> float | None:
    """None for what JSON has no number for."""
    return loss if math.isfinite(loss) else None


def check_ranks(places: list[tuple[str, str, int]], meant: int) -> None:
    """`UserError` unless the process group has the ranks that the trainer counts, each with a device of its own.
    `places`: name and number of the node, and local rank, of each rank."""
    if len(places) != meant:
        raise UserError(
            f"{len(places)} ranks have met, and the trainer counts {meant}: set trainer.devices and trainer.num_nodes "
            "to what the launcher starts"
        )
    shared = sorted({place for place in places if places.count(place) > 1})
    if shared:
        node, _, local_rank = shared[0]
        raise UserError(
            f"{places.count(shared[0])} ranks on {node} have LOCAL_RANK={local_rank}, and would share a device: give "
            "the ranks of a node the numbers from 0 on"
        )
