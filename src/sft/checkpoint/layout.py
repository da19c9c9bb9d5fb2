"""Which part of each parameter and of its optimizer state this rank holds: views of the live memory.

Every strategy keeps parameters in tensors of its own shape: whole (one device, DDP), as rows (FSDP2), or as ranges of
flat buffers (ZeRO). `held` says the same of all of them: this tensor, from here to there, is parameter NAME's flat
values from START on. So a checkpoint is written and read without gathering anything, by any strategy for any other.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Part:
    """A range of one parameter: `numel` flat values from `start` on, at `offset` of the flat `holder`."""

    name: str
    start: int
    numel: int
    holder: Tensor  # what the optimizer steps on, and its state's key
    offset: int

    @property
    def weight(self) -> Tensor:
        """View of the values, 1-D."""
        return flat(self.holder)[self.offset : self.offset + self.numel]

    def of(self, state: Tensor) -> Tensor:
        """View of the same range of an optimizer's state, 1-D."""
        return flat(state)[self.offset : self.offset + self.numel]


def flat(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor as a 1-D view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def full_shape(parameter: Tensor) -> list[int]:
    """The shape of a parameter, however little of it is here."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint holds: the trainable parameters, tied ones once. The others come from the base model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the weights, by name; every rank has them whole."""
    own_state = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in own_state]


def held(model: nn.Module, optimizer: Any) -> list[Part]:
    """This rank's part of each trainable parameter, as the optimizer holds it. Over all ranks they cover everything;
    where `replicated`, each rank's do."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass without backward the outermost is still gathered
    named = list(named_trainable(model))
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        return list(_zero3(named, optimizer))
    if _flat_groups(optimizer) is not None:
        return list(_zero12(named, optimizer))
    assert isinstance(optimizer, torch.optim.Optimizer), f"where {type(optimizer).__name__} keeps weights isn't known"
    return [part for name, parameter in named if (part := of_parameter(name, parameter)).numel]


def of_parameter(name: str, parameter: Any) -> Part:
    """The part that is in the parameter itself: all of it, FSDP2's rows of it or ZeRO-3's range of it."""
    if hasattr(parameter, "ds_tensor"):
        start = parameter.ds_tensor.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
        numel = min(parameter.ds_tensor.ds_numel, parameter.ds_numel - start)  # the last ones are padded
        return Part(name, start, max(0, numel), parameter.ds_tensor, 0)
    if isinstance(parameter, DTensor):
        # Rows are dealt as torch.chunk does; a row's values are contiguous, so rows are a range.
        mesh, (placement,) = parameter.device_mesh, parameter.placements
        assert placement.is_shard(dim=0), f"{name} is sharded by {placement}, not by rows"
        rows = parameter.shape[0]
        before = min(rows, -(-rows // mesh.size()) * mesh.get_local_rank())
        row = parameter.numel() // max(1, rows)
        return Part(name, before * row, parameter.to_local().numel(), parameter, 0)
    return Part(name, 0, parameter.numel(), parameter, 0)


def replicated(model: nn.Module, optimizer: Any) -> bool:
    """Whether every rank holds everything."""
    sharded = isinstance(model, FSDPModule) or hasattr(optimizer, "fp32_partitioned_groups_flat")
    return not sharded and _flat_groups(optimizer) is None


def _flat_groups(optimizer: Any) -> tuple[list[Tensor], list[list[Tensor]], list[list[int]]] | None:
    """Of ZeRO stages 1 and 2, for each group: this rank's range of the flat buffer, the parameters in the buffer, and
    where each begins."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        groups = optimizer.round_robin_bit16_groups
        return optimizer.single_partition_of_fp32_groups, groups, optimizer.round_robin_bit16_offsets
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # stage 1 in bf16 with fp32 gradients is a class of its own
        groups = optimizer.bf16_groups
        offsets = [list(accumulate((each.numel() for each in group), initial=0))[:-1] for group in groups]
        return optimizer.fp32_groups_flat_partition, groups, offsets
    return None


def _zero12(named: list[tuple[str, nn.Parameter]], optimizer: Any) -> Iterator[Part]:
    """Stages 1 and 2: each group of parameters is one flat buffer, cut into as many equal ranges as there are ranks."""
    name_of = {id(parameter): name for name, parameter in named}
    buffers = _flat_groups(optimizer)
    assert buffers is not None
    for holder, parameters, offsets, ranks in zip(*buffers, optimizer.real_dp_process_group, strict=True):
        first = holder.numel() * torch.distributed.get_rank(ranks)
        for parameter, offset in zip(parameters, offsets, strict=True):
            start, stop = max(first, offset), min(first + holder.numel(), offset + parameter.numel())
            if start < stop:
                yield Part(name_of[id(parameter)], start - offset, stop - start, holder, start - first)


def _zero3(named: list[tuple[str, nn.Parameter]], optimizer: Any) -> Iterator[Part]:
    """Stage 3: each parameter is cut into ranges, and a rank's ranges are laid end to end, a buffer a sub-group."""
    for name, parameter in named:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        own = of_parameter(name, parameter)
        if own.numel:
            yield Part(name, own.start, own.numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def allocate(model: nn.Module, device: torch.device) -> None:
    """Gives parameters that hold nothing yet (on the meta device) memory; buffers keep their values."""
    buffers = dict(model.named_buffers())
    model.to_empty(device=device)
    move_buffers(model, buffers, device)


def move_buffers(model: nn.Module, buffers: dict[str, Tensor], device: torch.device) -> None:
    """Puts these buffers, by name, into the model, on the device."""
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(device)


def inner(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that a strategy may have wrapped."""
    return getattr(optimizer, "optimizer", optimizer)


def publish(optimizer: Any) -> None:
    """Takes over weights that were written into the optimizer's own copies into the model's."""
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps; those copies are of before.
        if optimizer.persistent_parameters:
            for parameter in optimizer.persistent_parameters:
                parameter.partition()
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
    elif _flat_groups(optimizer) is not None:
        optimizer.update_lp_params()
