"""The LightningDataModule: the step plan as a loader of micro-batches, from any step on."""

from collections.abc import Iterator

import lightning as L
import numpy as np
import torch

from sft.data.batch import Batch, SampleSet, make_batch, to_device
from sft.data.step_plan import EpochPlan, Step, check_division, epoch_plan, eval_plan, position, share


class SFTDataModule(L.LightningDataModule):
    """Serves the steps `start_step` to `num_steps` of a run as one pass, across epochs.

    Args:
        train, val: the samples; no `val`, no validation.
        seed: the order of samples is drawn from it.
        epochs: passes over the training samples; `max_steps` cuts them short.
        global_batch_size: packs an optimizer step, over all ranks.
        micro_batch_size: packs a forward pass.
    """

    def __init__(
        self,
        train: SampleSet,
        val: SampleSet | None,
        *,
        seed: int,
        epochs: int,
        max_steps: int | None,
        global_batch_size: int,
        micro_batch_size: int,
        max_length: int,
        packing: bool,
        start_step: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val = train, val
        self.seed, self.max_length, self.packing = seed, max_length, packing
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.start_step = start_step
        self._plan: tuple[int, EpochPlan] | None = None
        self.steps_per_epoch = self.epoch(0).num_steps
        self.num_steps = min(epochs * self.steps_per_epoch, max_steps or epochs * self.steps_per_epoch)

    @property
    def probed(self) -> SampleSet:
        """The samples that prove an export."""
        return self.val if self.val is not None and len(self.val) else self.train

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch; the last one asked for is kept."""
        if self._plan is None or self._plan[0] != epoch:
            plan = epoch_plan(
                self.train.lengths,
                self.train.num_supervised,
                seed=self.seed,
                epoch=epoch,
                global_batch_size=self.global_batch_size,
                max_length=self.max_length,
                packing=self.packing,
            )
            self._plan = epoch, plan
        return self._plan[1]

    def step(self, global_step: int) -> Step:
        """What optimizer step `global_step`, counted from 0, trains on."""
        epoch, step = position(global_step, self.steps_per_epoch)
        return self.epoch(epoch).step(step)

    def train_dataloader(self) -> "_Steps":
        return _Steps(self)

    def val_dataloader(self) -> "_Validation | list[Batch]":
        return _Validation(self) if self.val is not None else []

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return to_device(batch, device)

    def accumulation(self) -> int:
        assert self.trainer is not None
        return check_division(self.global_batch_size, self.trainer.world_size, self.micro_batch_size)


class _Steps:
    """This rank's micro-batches of all steps that are left."""

    def __init__(self, data: SFTDataModule) -> None:
        self.data = data

    def __len__(self) -> int:
        return (self.data.num_steps - self.data.start_step) * self.data.accumulation()

    def __iter__(self) -> Iterator[Batch]:
        data = self.data
        assert data.trainer is not None
        for global_step in range(data.start_step, data.num_steps):
            step = data.step(global_step)
            for indices in share(
                step,
                data.train.lengths,
                world_size=data.trainer.world_size,
                micro_batch_size=data.micro_batch_size,
                accumulation=data.accumulation(),
                rank=data.trainer.global_rank,
            ):
                yield make_batch(data.train, indices, step.num_supervised)


class _Validation:
    """This rank's micro-batches of the validation samples."""

    def __init__(self, data: SFTDataModule) -> None:
        assert data.trainer is not None and data.val is not None
        self.val: SampleSet = data.val
        self.plan: list[np.ndarray] = eval_plan(
            data.val.lengths,
            max_length=data.max_length,
            packing=data.packing,
            micro_batch_size=data.micro_batch_size,
            world_size=data.trainer.world_size,
            rank=data.trainer.global_rank,
        )

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return (make_batch(self.val, indices, 1) for indices in self.plan)
