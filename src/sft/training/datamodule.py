"""The LightningDataModule: the step plan as a loader of micro-batches, from any step on."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from sft.data.batch import Batch, SampleSet, make_batch, to_device
from sft.data.step_plan import (
    DEFAULT_PACKS,
    EpochPlan,
    Step,
    accumulation,
    default_step,
    epoch_plan,
    eval_plan,
    most_eval_samples,
    most_samples,
    num_steps,
    share,
)
from sft.errors import UserError
from sft.evaluation.base import FixedTokens
from sft.model.isolation import Isolation
from sft.training.strategies import placement


class SFTDataModule(L.LightningDataModule):
    """Serves the steps `start_step` to `num_steps` of a run as one pass, across epochs.

    Args:
        train, val: the samples; no `val`, no validation.
        seed: the order of samples is drawn from it.
        epochs: passes over the training samples, which may be broken; `max_steps` takes their place.
        global_batch_size: packs an optimizer step, over all ranks; None: as `default_step` has it.
        micro_batch_size: packs a forward pass.
        val_sets: the samples of each validation set that has a name, which has a loader of its own.
        text: general text, whose loss each validation measures, too.
    """

    def __init__(
        self,
        train: SampleSet,
        val: SampleSet | None,
        *,
        seed: int,
        epochs: float,
        max_steps: int | None,
        global_batch_size: int | None,
        micro_batch_size: int,
        max_length: int,
        packing: bool,
        start_step: int = 0,
        val_sets: Mapping[str, NDArray[np.int64]] | None = None,
        text: SampleSet | None = None,
    ) -> None:
        super().__init__()
        self.train, self.val, self.text = train, val, text
        self.val_sets = dict(val_sets or {})
        self.seed, self.max_length, self.packing, self.micro_batch_size = seed, max_length, packing, micro_batch_size
        self.asked = global_batch_size or DEFAULT_PACKS  # what ranks and micro-batches must divide
        self.global_batch_size, self.pack_length = (
            (global_batch_size, max_length) if global_batch_size else default_step(train.lengths, max_length, packing)
        )
        self.start_step = start_step
        self.seconds_waited = 0.0  # by this process for training batches to be made
        self.fixed: FixedTokens | None = None  # at which the model is compared with that before training
        self.keyed = False  # whether tokens have keys: the model needs them if it draws random numbers
        self._plan: tuple[int, EpochPlan] | None = None
        self.num_packs = len(self.epoch(0).packs)  # the same in all epochs: see `packing`
        self.steps_per_epoch = self.epoch(0).num_steps
        self.num_steps = num_steps(epochs, max_steps, self.steps_per_epoch)
        self.tokens_per_epoch = int(train.lengths.sum(dtype=np.int64))
        self.supervised_per_epoch = int(train.num_supervised.sum(dtype=np.int64))

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch; the last one asked for is kept."""
        if self._plan is None or self._plan[0] != epoch:
            plan = epoch_plan(
                self.train.lengths,
                self.train.num_supervised,
                self.train.weight_sums,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                max_length=self.pack_length,
                packing=self.packing,
            )
            self._plan = epoch, plan
        return self._plan[1]

    def step(self, global_step: int) -> Step:
        """What optimizer step `global_step`, counted from 0, trains on."""
        epoch, step = divmod(global_step, self.steps_per_epoch)
        return self.epoch(epoch).step(step)

    def seen(self, num_steps: int) -> tuple[int, int]:
        """Tokens of the first `num_steps` steps, and supervised ones among them."""
        epochs, steps = divmod(num_steps, self.steps_per_epoch)
        tokens, supervised = self.epoch(epochs).seen[steps] if steps else (0, 0)
        return epochs * self.tokens_per_epoch + int(tokens), epochs * self.supervised_per_epoch + int(supervised)

    def setup(self, stage: str) -> None:
        """`UserError` if the trainer makes a step of another number of micro-batches, each of which is divided by the
        weight of a whole step."""
        assert self.trainer is not None
        num_ranks, made = self.trainer.world_size, self.trainer.accumulate_grad_batches
        if stage == "fit" and made != self.accumulation():
            raise UserError(
                f"the trainer accumulates {made} micro-batches, and a step takes {self.accumulation()}: "
                f"{self.global_batch_size} packs on {num_ranks} ranks in micro-batches of {self.micro_batch_size}: set "
                f"accumulate_grad_batches={self.accumulation()}"
            )

    def train_dataloader(self) -> "_Batches":
        return _Batches((self.num_steps - self.start_step) * self.accumulation(), lambda: self._timed(self._training()))

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.seconds_waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def _training(self) -> Iterator[Batch]:
        """This rank's micro-batches of all steps that are left."""
        assert self.trainer is not None
        division = {
            "world_size": self.trainer.world_size,
            "micro_batch_size": self.micro_batch_size,
            "accumulation": self.accumulation(),
        }
        keyed, counted = self.keyed or self._isolation().apart, self._waits_for_other_ranks()
        for global_step in range(self.start_step, self.num_steps):
            step, draw = self.step(global_step), (self.seed, global_step) if keyed else None
            most = most_samples(step, self.train.lengths, **division) if counted else None
            shared = share(step, self.train.lengths, **division, rank=self.trainer.global_rank)
            for number, indices in enumerate(shared):
                batch = make_batch(self.train, indices, step.weight, draw)
                if most is not None:
                    batch["num_parts"] = most[number]
                yield batch

    def _isolation(self) -> Isolation:
        assert self.trainer is not None
        return cast(Isolation, self.trainer.lightning_module.isolation)

    def _waits_for_other_ranks(self) -> bool:
        """Whether each forward pass has collectives, so that all ranks must make equally many."""
        assert self.trainer is not None
        shards = placement(self.trainer.strategy).sharding is not None
        return shards and self.trainer.world_size > 1 and self._isolation().apart

    def val_dataloader(self) -> "list[_Batches]":
        val = self.val
        if val is None:
            return []
        return [
            self._evaluation(val, samples, self._of_validation)
            for samples in self.val_sets.values() or [np.arange(len(val))]
        ]

    def text_dataloader(self) -> "_Batches":
        assert self.text is not None
        return self._evaluation(self.text, np.arange(len(self.text)), make_batch)

    def _of_validation(self, val: SampleSet, samples: NDArray[np.int64], step_weight: float) -> Batch:
        batch = make_batch(val, samples, step_weight)
        batch["samples"] = samples
        if self.fixed is not None:
            fixed = self.fixed.of_batch(samples, val.lengths)[1]
            batch["fixed"] = torch.from_numpy(fixed)
            ends = batch["counts"][:, 0].cumsum()
            batch["counts"][:, 2] = np.diff(np.searchsorted(fixed, ends), prepend=0)
        return batch

    def _evaluation(
        self,
        val: SampleSet,
        samples: NDArray[np.int64],
        make: Callable[[SampleSet, NDArray[np.int64], float], Batch],
    ) -> "_Batches":
        """This rank's micro-batches of these samples."""
        trainer = self.trainer
        assert trainer is not None
        settings: Any = {
            "max_length": self.max_length,
            "packing": self.packing,
            "micro_batch_size": self.micro_batch_size,
            "world_size": trainer.world_size,
        }
        lengths = val.lengths[samples]
        plan = eval_plan(lengths, **settings, rank=trainer.global_rank)

        def made() -> Iterator[Batch]:
            most = most_eval_samples(lengths, **settings) if self._waits_for_other_ranks() else None
            for number, indices in enumerate(plan):
                batch = make(val, samples[indices], 1)
                if most is not None:
                    batch["num_parts"] = most[number]
                yield batch

        return _Batches(len(plan), made)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    def accumulation(self, world_size: int | None = None) -> int:
        """Micro-batches of each of `world_size` ranks in a step; None: of the trainer's."""
        if world_size is None:
            assert self.trainer is not None
            world_size = self.trainer.world_size
        return accumulation(min(self.num_packs, self.global_batch_size), self.asked, world_size, self.micro_batch_size)


@dataclass(frozen=True)
class _Batches:
    """A rank's micro-batches, each made when its turn comes."""

    length: int
    made: Callable[[], Iterator[Batch]]

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return self.made()
