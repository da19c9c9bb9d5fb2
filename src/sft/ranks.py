"""What the ranks of a run tell each other outside the training step."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from sft.errors import UserError

disbanded = False  # whether this process was one of several ranks, and is alone now


def disband() -> None:
    """Ends the process group, on all ranks at once: NCCL's end waits for every rank's, so that those which are done
    would hold their GPUs until the first is."""
    global disbanded
    if dist.is_initialized():
        dist.destroy_process_group()
        disbanded = True


def place() -> tuple[int, int]:
    """(rank, world size)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together(action: Callable[[], Any]) -> list[Any]:
    """Each rank's result of `action`; raises on all ranks where it fails on one, so that none waits for ever."""
    error, value = None, None
    try:
        value = action()
    except Exception as failed:
        error = failed
    if error is not None and not dist.is_initialized():
        raise error
    told = [(None, value)]
    if dist.is_initialized():
        told = [(None, None)] * dist.get_world_size()
        dist.all_gather_object(told, (error and (isinstance(error, UserError), str(error)), value))
    if error is not None:
        raise error
    for rank, (failure, _) in enumerate(told):
        if failure:
            kind = UserError if failure[0] else RuntimeError
            raise kind(f"rank {rank}: {failure[1]}")
    return [value for _, value in told]
