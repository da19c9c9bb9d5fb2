"""A strategy of a user's own: each parameter is stepped by one rank alone, which sends it to the others."""

import zlib
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from sft.checkpoint.layout import Part, Whole, named_trainable
from sft.ranks import place
from sft.training.strategies import DDP, OptimizerFactory


def owner(name: str) -> int:
    _, world_size = place()
    return zlib.crc32(name.encode()) % world_size


class Dealt(Whole):
    """Only a parameter's owner has its optimizer state, so only its owner saves and reads it."""

    replicated = False

    def parts(self) -> list[Part]:
        rank, _ = place()
        return [part for part in super().parts() if owner(part.name) == rank]

    def publish(self, step: int) -> None:
        for name, parameter in named_trainable(self.model):
            dist.broadcast(parameter.data, owner(name))


class DealtAdamW(torch.optim.AdamW):
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        rank, _ = place()
        named = [
            pair for group in self.param_groups for pair in zip(group["param_names"], group["params"], strict=True)
        ]
        for name, parameter in named:
            if owner(name) != rank:
                parameter.grad = None
        super().step()
        for name, parameter in named:
            dist.broadcast(parameter.data, owner(name))
        return loss


class DealtStrategy(DDP):
    layout = Dealt

    def optimizer_factory(self, factory: OptimizerFactory) -> OptimizerFactory:
        assert isinstance(factory, partial)
        return partial(DealtAdamW, **factory.keywords)
