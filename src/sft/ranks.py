"""What the ranks of a run say to each other outside the training step."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from sft.errors import UserError

T = TypeVar("T")

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


def together(action: Callable[[], T]) -> list[T]:
    """Each rank's result of `action`; raises on all ranks where it fails on one, so that none waits for ever."""
    failure: Exception | None = None
    values: list[T] = []
    try:
        values = [action()]
    except Exception as error:
        failure = error
    if not dist.is_initialized():
        if failure is not None:
            raise failure
        return values
    answers: list[tuple[list[T], str | None, bool]] = [([], None, False)] * dist.get_world_size()
    dist.all_gather_object(answers, (values, failure and str(failure), isinstance(failure, UserError)))
    if failure is not None:
        raise failure
    for rank, (_, message, is_users) in enumerate(answers):
        if message is not None:
            raise (UserError if is_users else RuntimeError)(f"rank {rank}: {message}")
    return [value for values, _, _ in answers for value in values]
