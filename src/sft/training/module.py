"""The LightningModule: wires model, loss and optimizer together, and decides nothing."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from sft.checkpoint.layout import Read
from sft.data.batch import Batch
from sft.evaluation.validation_pass import ValidationPass
from sft.model import language_part, noise, router
from sft.model import optimizer as optimizers
from sft.model.isolation import Isolation
from sft.model.loading import ModelSource
from sft.model.loss import Objective, head_is_plain_matrix, nll
from sft.training.log import log
from sft.training.strategies import placement, weights_dtype


class SFTModule(L.LightningModule):
    """A causal language model with the loss on its supervised tokens.

    Args:
        source: where the model comes from; it is loaded by `configure_model`, on the strategy's terms.
        optimizer: makes the optimizer of a list of parameter groups.
        schedule: learning-rate factor of (step, num_steps).
        num_steps: optimizer steps of the whole run.
        seed: random weights and noise are drawn from it.
        resumed: the weights come from a checkpoint, so the pre-trained ones aren't read.
        objective: what is minimised besides −log p.
    """

    model: PreTrainedModel  # made by `configure_model`

    def __init__(
        self,
        source: ModelSource,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[..., float],
        num_steps: int,
        seed: int,
        resumed: bool = False,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.source, self.optimizer, self.schedule = source, optimizer, schedule
        self.num_steps, self.seed, self.resumed = num_steps, seed, resumed
        self.objective = objective or Objective()
        self.isolation = Isolation()  # as the model's first batch has proven
        self.first_values: Read | None = None  # in fp32, until the optimizer has them
        # Of the step under way or just made, read by the metrics: this rank's weighted sum of −log p and the like, the
        # norm of the whole gradient before clipping and, by value, its norm after it and its largest |value|.
        self.step_sums: dict[str, Tensor] = {}
        self.grad_norm = torch.tensor(float("nan"))
        self.clipped_values: Tensor | None = None
        self.val_loss = float("nan")
        self.val_losses: dict[str, float] = {}  # by metric: that, and each of the sets that have names
        self.measures: ValidationPass | None = None  # what a validation measures besides, and what it came to
        self.val_metrics: dict[str, float] = {}

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        torch.manual_seed(self.seed)  # from which all ranks draw the weights that no checkpoint has
        place = placement(self.trainer.strategy)
        keep = partial(setattr, self, "first_values") if place.rounds and not self.resumed else None
        dtype = weights_dtype(self.trainer)
        self.model = self.source.load(dtype, weights=not self.resumed, sharding=place.sharding, keep=keep)
        if frozen := language_part.said(self.model):
            log(frozen)
        self.plain_head = head_is_plain_matrix(self.model)
        self.router = router.attach(self.model, self.objective.router_aux, log)
        self.trainer.datamodule.keyed = noise.attach(self.model, self.source.neftune_alpha)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        noise.watch(self.model, log)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Random numbers are a function of the place in the run, as the step plan is: a resumed step draws
        # what the uninterrupted one would, and a checkpoint holds no generator's state. Where a model draws them in a
        # way that `noise` can't make one by token, they are one by micro-batch.
        micro_batch = batch_idx % self.trainer.accumulate_grad_batches
        place = [self.seed, self.trainer.global_step, self.global_rank, micro_batch]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))
        if micro_batch == 0:
            self.step_sums = {}
            # The forward pass makes the head's gradient: those of the step before must be gone by then. Lightning's
            # own call comes after it.
            self.trainer.optimizers[0].zero_grad()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        offload = (
            save_on_cpu(pin_memory=self.device.type == "cuda") if self.source.activation_offload else nullcontext()
        )
        sums: dict[str, Tensor] = {}
        with offload:
            for part in self.isolation.parts(batch):
                noise.TOKENS.use(part, alone=self.isolation.apart)
                terms = {"nll": nll(self.model, part, plain_head=self.plain_head, objective=self.objective)}
                if self.router:
                    terms |= self.router.measure(part)
                for name, term in terms.items():
                    noise.TOKENS.use_in_backward(term)
                    sums[name] = sums.get(name, 0) + term
        self.step_sums = {name: self.step_sums.get(name, 0) + value.detach() for name, value in sums.items()}
        # Rule 2: the update is the gradient of (weighted sum over the global batch) / (sum of its tokens' weights).
        # Lightning divides by the accumulation and the strategy averages over ranks; undo both.
        num_averaged = self.trainer.world_size * self.trainer.accumulate_grad_batches
        loss = sums["nll"].sum() * (num_averaged / batch["step_weight"])
        if self.router:
            num_tokens = self.trainer.datamodule.step(self.trainer.global_step).num_tokens  # type: ignore[attr-defined]
            loss = loss + sums["router_aux"] * (self.objective.router_aux * num_averaged / num_tokens)
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if self.trainer.strategy.handles_gradient_accumulation:
            return  # DeepSpeed clips within its step, and its strategy notes the norm
        by_value = gradient_clip_algorithm == "value"
        self.grad_norm, self.clipped_values = optimizers.clip(self.model, gradient_clip_val, by_value)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # A strategy that keeps the states elsewhere brings its own implementation of the same optimizer.
        place = placement(self.trainer.strategy)
        factory, sharded = place.optimizer_factory(self.optimizer), not place.layout.replicated
        optimizer = optimizers.build(self.model, factory, self.source.parameters, log, sharded)
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, self.num_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_validation_epoch_start(self) -> None:
        # Of each set, this rank's weighted sum of −log p, and the sum of the weights. On the device, so that nothing
        # waits for a batch.
        num_sets = max(1, len(self.trainer.datamodule.val_sets))  # type: ignore[attr-defined]
        self._val_sums = torch.zeros(num_sets, 2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        sums, weights = self._val_sums[dataloader_idx], batch["weights"]
        for part in self.isolation.parts(batch):
            if self.measures:
                sums[0] += self.measures.step(self.model, part, self.plain_head)
            else:
                sums[0] += nll(self.model, part, plain_head=self.plain_head)
        sums[1] += len(batch["predicting"]) if weights is None else weights.sum(dtype=sums.dtype)

    def on_validation_epoch_end(self) -> None:
        # Over all ranks: one token is one token.
        sums = self.trainer.strategy.reduce(self._val_sums, reduce_op="sum")
        assert isinstance(sums, Tensor)
        names = ["val/loss", *(f"val/loss/{name}" for name in self.trainer.datamodule.val_sets)]  # type: ignore[attr-defined]
        losses = [float(total / weight) for total, weight in (sums.sum(0), *sums)]
        self.val_loss, self.val_losses = losses[0], dict(zip(names, losses, strict=False))
        # For callbacks that monitor them (early stopping); the metrics callback writes them to the loggers.
        self.log_dict(self.val_losses, logger=False, sync_dist=True)
