"""Where a strategy keeps each parameter and its optimizer state: views of this rank's live memory.

Every strategy keeps parameters in tensors of its own shape: whole (one device, DDP), as rows (FSDP2), or as ranges of
flat buffers (ZeRO). A layout says the same of all of them: this tensor, from here to there, is parameter NAME's flat
values from START on. So a checkpoint is written and read without gathering anything, by any strategy for any other.
Each strategy names its layout; nothing else asks which strategy it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# DeepSpeed has no types: what it makes of a parameter, and one of its three wrappers of an optimizer.
DeepSpeedParameter = Any  # type: ignore[explicit-any]
DeepSpeedOptimizer = Any  # type: ignore[explicit-any]

Read = Callable[[str, int, int], Tensor]  # name, start, stop -> a weight's flat values, 1-D


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


class Whole:
    """Everything on every rank: one device, DDP. The layouts below differ from it."""

    replicated = True  # whether every rank holds everything

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer  # torch's, whose states are saved
        self.averages: dict[Tensor, Tensor] | None = None  # of the weights, fp32, shaped as the holder; None: not kept

    @staticmethod
    def part(name: str, parameter: Tensor) -> Part:
        """This rank's part of the parameter itself, from which pre-trained weights are read."""
        return Part(name, 0, parameter.numel(), parameter, 0)

    @staticmethod
    def loaded(parameter: Tensor) -> None:
        """Called when the parameter's part has been read from the pre-trained weights."""

    def parts(self) -> list[Part]:
        """This rank's part of each trainable parameter, where the optimizer keeps it. The parts of all ranks cover
        everything; where `replicated`, those of each rank do."""
        parts = [self.part(name, parameter) for name, parameter in named_trainable(self.model)]
        return [part for part in parts if part.numel]

    def begin(self, values: Read) -> None:
        """Puts first values where the optimizer keeps its own, which it has made of the model's rounded ones."""
        for part in self.parts():
            part.weight.copy_(values(part.name, part.start, part.start + part.numel))
        self.publish(step=0)

    def scalar(self, value: Tensor, part: Part) -> object:
        """A state that is one number for the whole parameter, from a tensor [1], as the optimizer keeps it."""
        on_device = any(group.get("fused") or group.get("capturable") for group in self.optimizer.param_groups)
        return value[0].to(part.holder.device if on_device else "cpu")

    def publish(self, step: int | None) -> None:
        """Called when weights, and the states of `step` unless it is None, were written into the parts: the model's own
        copies follow."""


class Rows(Whole):
    """FSDP2: each rank has some rows of each parameter."""

    replicated = False

    @staticmethod
    def part(name: str, parameter: Tensor) -> Part:
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        # Rows are dealt as torch.chunk does; a row's values are contiguous, so rows are a range.
        mesh, (placement,) = parameter.device_mesh, parameter.placements
        assert placement.is_shard(dim=0), f"{name} is sharded by {placement}, not by rows"
        num_rows = parameter.shape[0]
        first = min(num_rows, -(-num_rows // mesh.size()) * mesh.get_local_rank())
        row = parameter.numel() // max(1, num_rows)
        return Part(name, first * row, parameter.to_local().numel(), parameter, 0)

    def parts(self) -> list[Part]:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # after a forward pass without backward the outermost is still gathered
        return super().parts()


class ZeRO12(Whole):
    """DeepSpeed's stages 1 and 2: each group of parameters is one flat buffer, cut into a range for each rank."""

    replicated = False

    def __init__(self, model: nn.Module, optimizer: DeepSpeedOptimizer) -> None:
        super().__init__(model, optimizer.optimizer)
        self.wrapper = optimizer

    def parts(self) -> list[Part]:
        name_of = {id(parameter): name for name, parameter in named_trainable(self.model)}
        parts = []
        for holder, parameters, offsets, ranks in self._groups():
            first = holder.numel() * torch.distributed.get_rank(ranks)
            for parameter, offset in zip(parameters, offsets, strict=True):
                start, stop = max(first, offset), min(first + holder.numel(), offset + parameter.numel())
                if start < stop:
                    name = name_of[id(parameter)]
                    parts.append(Part(name, start - offset, stop - start, holder, start - first))
        return parts

    def _groups(self) -> Iterator[tuple[Tensor, list[Tensor], list[int], torch.distributed.ProcessGroup]]:
        """Of each group: this rank's range of the buffer, its parameters, where each begins in it, the ranks."""
        wrapper = self.wrapper
        if hasattr(wrapper, "fp32_groups_flat_partition"):  # stage 1 in bf16 with fp32 gradients is a class of its own
            holders, groups = wrapper.fp32_groups_flat_partition, wrapper.bf16_groups
            offsets = [list(accumulate((tensor.numel() for tensor in group), initial=0))[:-1] for group in groups]
        else:
            holders, groups = wrapper.single_partition_of_fp32_groups, wrapper.round_robin_bit16_groups
            offsets = wrapper.round_robin_bit16_offsets
        return zip(holders, groups, offsets, wrapper.real_dp_process_group, strict=True)

    def scalar(self, value: Tensor, part: Part) -> object:
        # DeepSpeed's own optimizers count steps in plain numbers.
        own = type(self.optimizer).__module__.startswith("deepspeed")
        return int(value) if own else super().scalar(value, part)

    def publish(self, step: int | None) -> None:
        self.wrapper.update_lp_params()
        if step is not None:
            self._count_host_steps(step)

    def _count_host_steps(self, step: int) -> None:
        """DeepSpeed's AdamW for the host multiplies the powers of beta up from step to step: to the same bits again."""
        adam: DeepSpeedOptimizer = self.optimizer
        if not hasattr(adam, "ds_opt_adam"):
            return
        nothing, group = torch.zeros(1), adam.param_groups[0]
        settings = (*group["betas"], group["eps"], 0.0, group["bias_correction"])
        for number in range(1, step + 1):
            adam.ds_opt_adam.adam_update(adam.opt_id, number, 0.0, *settings, nothing, nothing, nothing, nothing)


class ZeRO3(ZeRO12):
    """DeepSpeed's stage 3: each parameter is cut into ranges; a rank's ranges lie end to end, a buffer a sub-group."""

    @staticmethod
    def part(name: str, parameter: DeepSpeedParameter) -> Part:
        ranges = parameter.ds_tensor
        start = ranges.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
        numel = min(ranges.ds_numel, parameter.ds_numel - start)  # the last ones are padded
        return Part(name, start, max(0, numel), ranges, 0)

    @staticmethod
    def loaded(parameter: DeepSpeedParameter) -> None:
        if hasattr(parameter, "ds_secondary_tensor"):  # ZeRO++'s second copy is older
            parameter.ds_secondary_tensor = None

    def parts(self) -> list[Part]:
        parts = []
        for name, parameter in named_trainable(self.model):
            group, offset, _ = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
            own = self.part(name, parameter)
            if own.numel:
                parts.append(Part(name, own.start, own.numel, self.wrapper.fp32_partitioned_groups_flat[group], offset))
        return parts

    def publish(self, step: int | None) -> None:
        wrapper = self.wrapper
        for group in range(len(wrapper.fp32_partitioned_groups_flat)):
            wrapper._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters stay gathered between steps; those copies are older.
        if wrapper.persistent_parameters:
            for parameter in wrapper.persistent_parameters:
                parameter.partition()
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
        wrapper.invalidate_secondary_tensor()
        if step is not None:
            self._count_host_steps(step)


def flat(tensor: Tensor) -> Tensor:
    """This rank's values of a tensor as a 1-D view."""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.detach().view(-1)


def fp32_like(holder: Tensor) -> Tensor:
    """Zeros in fp32, shaped and placed as a holder."""
    return torch.zeros_like(holder, dtype=torch.float32, requires_grad=False)


def full_shape(parameter: Tensor) -> list[int]:
    """The shape of a parameter, however little of it is on this rank."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def named_trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """What a checkpoint holds: the trainable parameters, tied ones once. The others come from the base model."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def persistent_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Buffers that belong to the weights, by name; every rank has them whole."""
    own_state = model.state_dict(keep_vars=True).keys()
    return [(name, buffer) for name, buffer in model.named_buffers() if name in own_state]


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
