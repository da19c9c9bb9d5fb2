"""Faults that a certificate must find, each planted in a rank's process before it trains, and the cells in which."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sft.data.batch import Batch
from sft.data.labels import IGNORE
from sft.model import head, loss
from sft.model.found import Proof
from sft.model.isolation import Isolation
from sft.proof import excerpt
from sft.proof.cells import Cell
from sft.training import first_batch, strategies
from sft.training.datamodule import SFTDataModule
from sft.training.module import SFTModule


def mean_of_each_micro_batch() -> None:
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        copies = self.trainer.world_size * self.trainer.accumulate_grad_batches
        weights = batch["weights"]
        own = max(1, int((batch["labels"] != IGNORE).sum())) if weights is None else float(weights.sum())
        return original(self, batch, batch_idx) * (batch["step_weight"] / (copies * own))

    SFTModule.training_step = training_step


def divided_by_the_accumulation_again() -> None:
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        return original(self, batch, batch_idx) / self.trainer.accumulate_grad_batches

    SFTModule.training_step = training_step


def divided_by_the_accumulation_again_by_deepspeed() -> None:
    del strategies.DeepSpeed.backward  # Lightning's own


def _with_inputs(**changes: object) -> None:
    """Samples share a row of transformers' own attention, which guesses from the positions where one begins, and which
    a cache or a mask confuses."""
    first_batch.prove = lambda trainer, module: Proof(Isolation("sdpa"), {})
    head.model_inputs = lambda model, batch: {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "use_cache": False,
        **{name: value(batch) if callable(value) else value for name, value in changes.items()},
    }


def cache_on() -> None:
    _with_inputs(use_cache=True)


def mask_of_ones() -> None:
    _with_inputs(attention_mask=lambda batch: torch.ones_like(batch["input_ids"]))


def positions_go_on() -> None:
    _with_inputs(position_ids=lambda batch: torch.arange(batch["input_ids"].shape[1]).to(batch["input_ids"])[None])


def shifted_mask() -> None:
    original = excerpt.Excerpt.__getitem__

    def shifted(self: excerpt.Excerpt, index: int) -> tuple[object, object]:
        ids, labels = original(self, index)
        moved = ids.copy()
        moved[1:][labels[:-1] == IGNORE] = IGNORE
        moved[0] = IGNORE
        return ids, moved

    excerpt.Excerpt.__getitem__ = shifted


def small_step_dropped() -> None:
    def whole_steps(self: SFTDataModule, global_step: int) -> object:
        epoch, step = divmod(global_step, self.num_packs // self.global_batch_size)
        return self.epoch(epoch).step(step)

    SFTDataModule.step = whole_steps


def small_step_without_update() -> None:
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        data = self.trainer.datamodule
        whole = len(data.step(self.trainer.global_step).packs) == data.global_batch_size
        return original(self, batch, batch_idx) * float(whole)

    SFTModule.training_step = training_step


def tokens_without_loss_counted() -> None:
    original = excerpt.Excerpt.__init__

    def __init__(self: excerpt.Excerpt, *arguments: Any) -> None:
        original(self, *arguments)
        self.num_supervised = self.weight_sums = self.lengths

    excerpt.Excerpt.__init__ = __init__


def weights_ignored() -> None:
    excerpt.Excerpt.reweighted = lambda self, seed: self


def weights_left_out_of_the_sum() -> None:
    excerpt.Excerpt.weights = lambda self, index: None


def weights_left_out_of_the_gradient() -> None:
    original = loss.linear_nll

    def linear_nll(hidden: torch.Tensor, weight: torch.Tensor, target_N: torch.Tensor, *weights: Any) -> torch.Tensor:
        plain = original(hidden, weight, target_N)
        return plain + (original(hidden, weight, target_N, *weights) - plain).detach()

    loss.linear_nll = linear_nll


def weights_left_out_of_the_divisor() -> None:
    original = excerpt.Excerpt.__init__

    def __init__(self: excerpt.Excerpt, *arguments: Any) -> None:
        original(self, *arguments)
        self.weight_sums = self.num_supervised

    excerpt.Excerpt.__init__ = __init__


def weight_of_the_token_before() -> None:
    original = excerpt.Excerpt.weights
    excerpt.Excerpt.weights = lambda self, index: np.roll(original(self, index), 1)


def weights_decay_all() -> None:
    """Biases and norms too."""
    from torch.optim import SGD

    original = SGD.__init__

    def __init__(self: SGD, groups: list[dict[str, Any]], **options: Any) -> None:
        original(self, [{"params": group["params"]} for group in groups], **options)

    SGD.__init__ = __init__


def optimizer_forgotten_on_resume() -> None:
    from sft.checkpoint.checkpoint import Checkpoint
    from sft.checkpoint.layout import Whole

    original = Checkpoint.restore

    def restore(self: Checkpoint, layout: Whole, *options: Any, **named: Any) -> None:
        original(self, layout, *options, **named)
        for state in layout.optimizer.state.values():
            state["exp_avg_sq"].zero_()

    Checkpoint.restore = restore


def biases_of_experts_moved() -> None:
    """All alike, so that the same experts are chosen: only the checkpoint shows it."""
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        for name, buffer in self.model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer += 1e-3
        return original(self, batch, batch_idx)

    SFTModule.training_step = training_step


def groups_of_patterns_forgotten() -> None:
    from sft.model import optimizer

    original = optimizer.groups
    optimizer.groups = lambda model, chosen: [
        (name, {"params": group["params"]} if "lr" in group else group) for name, group in original(model, chosen)
    ]


def _with_tokens(change: Callable[[Any, Batch], None]) -> None:
    from sft.model.noise import Tokens

    original = Tokens.use

    def use(self: Tokens, batch: Batch, alone: bool = False) -> None:
        original(self, batch, alone)
        change(self, batch)

    Tokens.use = use


def noise_by_the_length_of_the_pack() -> None:
    def whole(tokens: Any, batch: Batch) -> None:
        tokens.cu_seqlens = batch["cu_seqlens"][[0, -1]]

    _with_tokens(whole)


def noise_by_the_place_in_the_pack() -> None:
    def places(tokens: Any, batch: Batch) -> None:
        tokens.key_T = torch.arange(batch["input_ids"].shape[1], dtype=torch.int32)

    _with_tokens(places)


def smoothing_and_z_loss_left_out_of_the_gradient() -> None:
    original = loss.linear_nll

    def linear_nll(
        hidden: torch.Tensor, weight: torch.Tensor, target_N: torch.Tensor, token_weight_N: Any = None, adds: Any = None
    ) -> torch.Tensor:
        plain = original(hidden, weight, target_N, token_weight_N)
        if adds is None:
            return plain
        parts = original(hidden, weight, target_N, token_weight_N, adds).detach()
        return torch.stack([plain, parts[1], parts[2]])

    loss.linear_nll = linear_nll


def experts_balanced_by_the_supervised_tokens() -> None:
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        measure = self.router.measure
        step = self.trainer.datamodule.step(self.trainer.global_step)
        self.router.measure = lambda batch: {
            name: value * (step.num_tokens / step.num_supervised) for name, value in measure(batch).items()
        }
        try:
            return original(self, batch, batch_idx)
        finally:
            del self.router.measure

    SFTModule.training_step = training_step


def masters_rounded() -> None:
    """The optimizer's own weights begin at what bf16 makes of the files'."""
    from sft.checkpoint.layout import Whole

    Whole.begin = lambda self, values: None


def average_forgotten_on_resume() -> None:
    """It begins anew with the weights of the step."""
    from sft.training.averaging import Averaging

    original = Averaging.on_train_start

    def on_train_start(self: Averaging, *arguments: Any) -> None:
        self.averages.clear()
        original(self, *arguments)

    Averaging.on_train_start = on_train_start


def average_left_in_the_model() -> None:
    """The weights are not put back after the probes of a save."""
    from contextlib import contextmanager

    from sft.training.averaging import Averaging

    original = Averaging.swapped_in

    @contextmanager
    def swapped_in(self: Averaging, trainer: Any, module: Any) -> Any:
        self.kept = original(self, trainer, module)  # or its end would put them back
        self.kept.__enter__()
        yield

    Averaging.swapped_in = swapped_in


def average_of_each_micro_batch() -> None:
    """The weights of a step count as often as it has micro-batches."""
    from sft.training.averaging import Averaging

    original = Averaging.on_train_batch_end

    def on_train_batch_end(
        self: Averaging, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.averages or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            original(self, trainer, module, outputs, batch, trainer.accumulate_grad_batches - 1)

    Averaging.on_train_batch_end = on_train_batch_end


def dies() -> None:
    import os

    SFTModule.training_step = lambda self, batch, batch_idx: os._exit(3)


def hangs() -> None:
    import time

    SFTModule.training_step = lambda self, batch, batch_idx: time.sleep(600)


def second_rank_raises_without_accumulation() -> None:
    """Where a rank's share of a step is one micro-batch, the second rank raises and leaves the first waiting."""
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        if self.trainer.accumulate_grad_batches == 1 and self.global_rank == 1:
            raise RuntimeError("out of luck")
        return original(self, batch, batch_idx)

    SFTModule.training_step = training_step


def cell(
    strategy: str = "single",
    num_ranks: int = 1,
    accumulation: int = 1,
    packed: bool = False,  # the plain loop has fewer samples to go through
    resumed: bool = False,
    optimizer: str = "sgd",
    precision: str = "32-true",
    variant: str = "",
) -> Cell:
    return Cell(strategy, num_ranks, accumulation, packed, resumed, optimizer, precision, variant=variant)


PATTERNS, OBJECTIVE = (cell(accumulation=2, packed=True, variant=variant) for variant in ("patterns", "objective"))
EXPERTS = cell("ddp", 2, 2, packed=True, variant="experts")
PLAIN, WEIGHTED = cell(accumulation=2, packed=True), cell(accumulation=2, packed=True, variant="weighted")
AVERAGED, AVERAGED_AGAIN = (
    cell(accumulation=2, packed=True, resumed=again, variant="averaging") for again in (False, True)
)
WEIGHTED_RANKS = cell("ddp", 2, 2, packed=True, variant="weighted")


FAULTS: dict[Callable[[], None], tuple[list[Cell], list[Cell]]] = {  # fault -> cells that fail, cells that pass
    mean_of_each_micro_batch: ([cell("ddp", 2), cell(accumulation=2), WEIGHTED, WEIGHTED_RANKS], [cell()]),
    divided_by_the_accumulation_again: ([cell(accumulation=4)], [cell()]),
    divided_by_the_accumulation_again_by_deepspeed: (
        [cell(f"deepspeed_zero{stage}", accumulation=2) for stage in (1, 2, 3)],
        [cell("ddp", accumulation=2), cell("deepspeed_zero2")],
    ),
    cache_on: ([cell()], []),
    mask_of_ones: ([cell()], []),
    positions_go_on: ([cell()], []),
    shifted_mask: ([cell()], []),
    small_step_dropped: ([cell()], []),
    small_step_without_update: ([cell()], []),
    tokens_without_loss_counted: ([cell()], []),
    weights_ignored: ([WEIGHTED], [PLAIN]),
    weights_left_out_of_the_sum: ([WEIGHTED, WEIGHTED_RANKS], [PLAIN]),
    weights_left_out_of_the_gradient: ([WEIGHTED], [PLAIN]),
    weights_left_out_of_the_divisor: ([WEIGHTED, WEIGHTED_RANKS], [PLAIN]),
    weight_of_the_token_before: ([WEIGHTED], []),
    weights_decay_all: ([cell()], [cell(optimizer="adamw")]),
    optimizer_forgotten_on_resume: (
        [cell(optimizer="adamw", resumed=True)],
        [cell(optimizer="adamw"), cell(), cell(resumed=True)],
    ),
    groups_of_patterns_forgotten: ([PATTERNS], []),
    noise_by_the_length_of_the_pack: ([OBJECTIVE], []),
    noise_by_the_place_in_the_pack: ([OBJECTIVE], []),
    smoothing_and_z_loss_left_out_of_the_gradient: ([OBJECTIVE], []),
    average_forgotten_on_resume: ([AVERAGED_AGAIN], [AVERAGED]),
    average_left_in_the_model: ([AVERAGED], [PLAIN]),
    average_of_each_micro_batch: ([AVERAGED], [PLAIN]),
    dies: ([cell("ddp", 2)], []),
}
