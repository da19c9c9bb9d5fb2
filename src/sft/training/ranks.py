"""What the ranks of a run tell each other outside the training step."""

from typing import Any

import torch.distributed as dist


def place() -> tuple[int, int]:
    """(rank, world size)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def agree(error: BaseException | None, value: Any = None) -> list[Any]:
    """Each rank's value; raises on all ranks where one has failed, so that none waits for it for ever."""
    if not dist.is_initialized():
        if error is not None:
            raise error
        return [value]
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (None if error is None else f"{type(error).__name__}: {error}", value))
    if error is not None:
        raise error
    for rank, (message, _) in enumerate(told):
        if message:
            raise RuntimeError(f"rank {rank} has failed: {message}")
    return [value for _, value in told]
