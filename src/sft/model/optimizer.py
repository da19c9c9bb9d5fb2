"""The optimizer, which `conf/optimizer/*.yaml` names, the clipping of gradients, and learning-rate schedules."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from sft.checkpoint.layout import flat
from sft.checkpoint.save import is_scalar
from sft.errors import UserError
from sft.model.parameters import Parameters, describe, groups

NORM_BLOCK = 2**16  # numbers


def build(
    model: nn.Module,
    factory: Callable[..., Optimizer],
    parameters: Parameters | None = None,
    log: Callable[[str], None] = lambda line: None,
    sharded: bool = False,
) -> Optimizer:
    """The factory's optimizer over the groups of `parameters`; without, of two: matrices decay; biases, norms and
    other vectors don't. `log` gets a line for each. `sharded`: a rank steps on a part of a parameter's values."""
    named = groups(model, parameters or Parameters())
    try:
        optimizer = factory([group for _, group in named])
    except (TypeError, ValueError) as error:
        raise UserError(f"the optimizer refuses its settings: {error}") from error
    if not type(optimizer).__module__.startswith("deepspeed"):  # which is torch's AdamW, elsewhere
        _try_out(factory, sharded)
    for (name, _), group in zip(named, optimizer.param_groups, strict=True):
        log(describe(name, group))
    return optimizer


def _try_out(factory: Callable[..., Optimizer], sharded: bool) -> None:
    """Two steps on made-up matrices, before any of the model: UserError for an optimizer that can't make them without a
    closure, or whose states no checkpoint holds, or, if `sharded`, that needs a parameter's values all together."""
    values = torch.linspace(-1, 1, 24).view(4, 6)
    whole, halves = [values.clone()], list(values.clone().split(2))
    try:
        for tensors in (whole, halves):
            parameters = [(str(place), nn.Parameter(tensor)) for place, tensor in enumerate(tensors)]
            optimizer = factory([{"params": parameters}])
            for _ in range(2):
                for (_, parameter), gradient in zip(parameters, values.cos().split(len(tensors[0])), strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
    except Exception as error:  # whatever a class of the user's own may raise
        raise UserError(f"the optimizer can't step on a matrix without a closure: {error}") from error
    name = type(optimizer).__name__
    kept = {id(parameter) for _, parameter in parameters}
    for owner, state in optimizer.state.items():
        for field, value in state.items() if id(owner) in kept else [(owner, "")]:
            alike = type(value) is Tensor and value.shape == owner.shape and value.is_floating_point()
            if not (alike or value is None or is_scalar(value)):
                raise UserError(
                    f"the optimizer {name} can't be used: its state {field} is neither a number nor shaped"
                    " like its parameter, so no checkpoint holds it: set optimizer=adamw"
                )
    if sharded and not torch.allclose(whole[0], torch.cat(halves), rtol=1e-5, atol=1e-7):
        raise UserError(
            f"the optimizer {name} needs all values of a matrix together, and this strategy shards them: set "
            "strategy=ddp, or optimizer=adamw"
        )


def clip(model: nn.Module, largest: float | None, by_value: bool) -> tuple[Tensor, Tensor | None]:
    """Clips the gradients, all together to a norm of `largest`, or each value to ±`largest`; None or 0: not at all.

    Returns their norm over all ranks before it and, by value, [2] their norm after it and the largest |value| before.
    """
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = total_norm(grads)
    if not (by_value and largest):
        if largest:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), largest, norm)
        return norm, None
    before = _whole(torch.nn.utils.get_total_norm(grads, float("inf")))
    for grad in grads:
        flat(grad).clamp_(-largest, largest)
    return norm, torch.stack([total_norm(grads), before])


def total_norm(tensors: list[Tensor]) -> Tensor:
    """Root of the sum of all squares, over all ranks for DTensors, else of the values given. On a processor torch adds
    up a tensor's squares in fp32 one after the other, 2 % too few for the embeddings of a large vocabulary; block by
    block the norm is exact to 1e-6. (What FSDP2 shards is left to torch: only tests do that on a processor.)"""
    blocks: list[Tensor] = []
    for tensor in tensors:
        whole = tensor.is_cuda or isinstance(tensor, DTensor)
        blocks += [tensor] if whole else tensor.reshape(-1).split(NORM_BLOCK)
    return _whole(torch.nn.utils.get_total_norm(blocks))


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
