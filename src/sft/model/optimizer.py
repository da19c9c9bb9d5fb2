"""Weight decay by parameter, and learning-rate schedules. `conf/optimizer/*.yaml` names the optimizer."""

import math
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from sft.checkpoint.layout import full_shape, named_trainable
from sft.errors import UserError


def build(model: nn.Module, factory: Callable[..., Optimizer]) -> Optimizer:
    """The factory's optimizer over two groups: matrices decay; biases, norms and other vectors don't.

    Parameters go in by name, so that a checkpoint can tell whose state it holds on any number of ranks.
    """
    matrices: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in named_trainable(model):
        # Sharded by ZeRO-3 every parameter looks like a vector: ask for its true shape.
        (matrices if len(full_shape(parameter)) >= 2 else vectors).append((name, parameter))
    groups: list[dict[str, object]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    try:
        return factory([group for group in groups if group["params"]])
    except (TypeError, ValueError) as error:
        raise UserError(f"the optimizer refuses its settings: {error}") from error


# Learning-rate factors: pure functions of (step, num_steps), step counting from 0 in optimizer steps.
# `warmup` below 1 is a share of the run, from 1 on a number of steps; the first step already moves.


def cosine(step: int, num_steps: int, warmup: float = 0.03, final: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `final` (SGDR, arXiv 1608.03983, without restarts)."""
    rising, progress = _phase(step, num_steps, warmup)
    return rising if rising < 1 else final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(step: int, num_steps: int, warmup: float = 0.03, final: float = 0.0) -> float:
    """Linear warm-up, then a straight line from 1 to `final`."""
    rising, progress = _phase(step, num_steps, warmup)
    return rising if rising < 1 else 1 - (1 - final) * progress


def constant(step: int, num_steps: int, warmup: float = 0.03) -> float:
    """Linear warm-up, then 1."""
    return min(1.0, _phase(step, num_steps, warmup)[0])


def warmup_stable_decay(
    step: int, num_steps: int, warmup: float = 0.03, decay: float = 0.2, final: float = 0.0
) -> float:
    """Linear warm-up, then 1, then a straight line to `final` (MiniCPM, arXiv 2404.06395).

    `decay` is the length of the last phase: below 1 a share of the run, from 1 on a number of steps.
    """
    rising, _ = _phase(step, num_steps, warmup)
    num_decay = max(1, steps_of(decay, num_steps))
    remaining = (num_steps - step) / num_decay
    return rising if rising < 1 else final + (1 - final) * min(1.0, remaining)


def steps_of(share_or_steps: float, num_steps: int) -> int:
    return round(share_or_steps * num_steps) if share_or_steps < 1 else int(share_or_steps)


def _phase(step: int, num_steps: int, warmup: float) -> tuple[float, float]:
    """(warm-up's factor, 1 from its end on; progress 0..1 through the rest, 1 just after the last step)."""
    num_warmup = steps_of(warmup, num_steps)
    rising = (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return rising, min(1.0, max(0.0, progress))
