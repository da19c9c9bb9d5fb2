"""How far do the layers move? Norms of weights and of their updates, by groups of layers, every so many steps.

A group is measured in a step of its own: the first in the first step, the next in the one after. Between the backward
pass, when the activations are gone, and the optimizer's step it takes a copy of that group's weights, at most about a
quarter of them, which the ranks share among them however they share the weights. Other steps cost nothing.
"""

import math
from itertools import pairwise

import lightning as L
import torch
from torch import Tensor, nn

from sft.checkpoint.layout import Part, named_trainable
from sft.model.loading import decoder_layers
from sft.model.optimizer import total_norm
from sft.training.averaging import layout
from sft.training.log import log
from sft.training.module import SFTModule

NUM_DEPTHS = 4  # at most so many groups of decoder layers


class Layers:
    """Measures a group of layers around an optimizer step.

    Args:
        every: steps between two measurements of a group; 0: none.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.group_of: dict[str, str] = {}  # by name of a trained parameter
        self.before: list[tuple[str, Part, Tensor]] = []  # group, this rank's part, and its weights before the update
        self.failed = False  # for want of memory

    def begin_fit(self, module: SFTModule) -> None:
        self.group_of = by_depth(module.model)

    def due(self, step: int) -> list[str]:
        """The groups that are measured in a step, counted from 1: the same whether the run was resumed or not."""
        groups = list(dict.fromkeys(self.group_of.values()))
        return [name for place, name in enumerate(groups) if self.every and (step - 1 - place) % self.every == 0]

    def before_update(self, trainer: L.Trainer, module: SFTModule) -> None:
        due = self.due(trainer.global_step + 1)
        if not due:
            return
        where = layout(trainer, module)
        parts = [part for part in where.parts() if self.group_of[part.name] in due]
        if where.replicated:
            parts = parts[trainer.global_rank :: trainer.world_size]
        try:
            self.before = [(self.group_of[part.name], part, part.weight.clone()) for part in parts]
        except torch.OutOfMemoryError:
            self.failed = True

    def after_update(self, trainer: L.Trainer, module: SFTModule) -> dict[str, float]:
        """Columns of the step that has just been made."""
        due = self.due(trainer.global_step)
        if not due:
            return {}
        # Sums of squares of weights and of updates, of this rank's parts.
        sums = torch.zeros(len(due), 2, dtype=torch.float64, device=module.device)
        for group, part, before in self.before:
            norms = (total_norm([part.weight]), total_norm([before.sub_(part.weight)]))
            for place, norm in enumerate(norms):
                sums[due.index(group), place] += norm.double() ** 2
        self.before = []
        if self.failed:
            sums += torch.inf
        of_all = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(of_all, Tensor)
        columns: dict[str, float] = {}
        for group, (weight, update) in zip(due, of_all.sqrt().tolist(), strict=True):
            if math.isinf(weight):  # on all ranks
                log("layers: a rank lacks the memory to measure them, so they aren't: evaluation.layers_every=0")
                self.every = 0
                return {}
            columns |= {f"train/weight_norm/{group}": weight}
            columns |= {f"train/update_ratio/{group}": update / weight} if weight else {}
        return columns


def by_depth(model: nn.Module) -> dict[str, str]:
    """The group of each trained parameter, by name, in the order of the model: embeddings, layers.0-7 and so on, head,
    and rest, such as the last norm."""
    of_layers = {id(layer) for layer in decoder_layers(model)}
    named = [name for name, module in model.named_modules() if id(module) in of_layers]
    names = [name for name in named if not any(name.startswith(f"{outer}.") for outer in named)]
    bounds = sorted({round(len(names) * depth / NUM_DEPTHS) for depth in range(NUM_DEPTHS + 1)})
    groups = {
        f"layers.{first}" + (f"-{end - 1}" if end - first > 1 else ""): names[first:end]
        for first, end in pairwise(bounds)
    }
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = {id(parameter) for parameter in output.parameters()} if output is not None else set()

    def group(name: str, parameter: nn.Parameter) -> str:
        for title, prefixes in groups.items():
            if any(name.startswith(f"{prefix}.") for prefix in prefixes):
                return title
        return "embeddings" if id(parameter) in embeddings else "head" if id(parameter) in head else "rest"

    return {name: group(name, parameter) for name, parameter in named_trainable(model)}
