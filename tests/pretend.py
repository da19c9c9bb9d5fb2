"""A device that isn't the processor, for a machine without one: what holds of CUDA holds of it.

Its tensors keep their values in the host's memory, so that numbers come out as on the processor, and refuse what CUDA
refuses: an operation on tensors of two devices, a generator of another device, NumPy. `syncs` notes each operation that
makes the host wait for the device. Python alone, by torch's interface for backends written in it; once installed it
can't be taken away, so it belongs in a process of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
SETTINGS = (
    "+strategy._target_=lightning.pytorch.strategies.SingleDeviceStrategy",
    f"+strategy.device={NAME}:0",
    f"trainer.accelerator={{_target_:{__name__}.Card}}",
)
aten = torch.ops.aten
# With an argument or a result in the host's memory, or of a size that only the device knows.
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default}
FACTORIES = ("empty.memory_format", "empty_strided", "_copy_from", "_to_copy", "copy_", "detach", "set_.source_Tensor")

syncs: list[str] = []


class Tensor(torch.Tensor):
    """On the device by its name; its values are `host`."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor, /, requires_grad: bool = False, **_: Any) -> torch.Tensor:
        if host.is_meta:  # accelerate makes an empty parameter by the class and attributes of the one it replaces
            return torch.nn.Parameter(host, requires_grad)
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> "Tensor":
        return Tensor(inner["host"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return run(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:
        return f"{NAME}({self.host})"


def host(value: Any) -> Any:
    return value.host if isinstance(value, Tensor) else value


def run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One operation of ATen."""
    here = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    device = kwargs.get("device")
    to_device = torch.device(device).type == NAME if device is not None else bool(here)
    if function is aten.copy_.default:
        if isinstance(args[0], Tensor) != isinstance(args[1], Tensor) and True not in args[2:]:
            syncs.append(str(function))
        host(args[0]).copy_(host(args[1]))
        return args[0]
    moves = function is aten._to_copy.default and to_device != bool(here) and not kwargs.get("non_blocking")
    if function in WAITS or moves:
        syncs.append(str(function))
    elif here and function is not aten._to_copy.default:
        for each in pytree.tree_leaves((args, kwargs)):
            if isinstance(each, torch.Tensor) and not isinstance(each, Tensor) and each.ndim:
                raise RuntimeError(f"Expected all tensors to be on the same device: {function}, {tuple(each.shape)}")
    if to_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu'")
    changed = {"device": torch.device("cpu")} if to_device and device is not None else {}
    made = function(*pytree.tree_map(host, args), **pytree.tree_map(host, kwargs | changed))
    if not to_device:
        return made
    wrapped = pytree.tree_map_only(torch.Tensor, Tensor, made)
    return return_and_correct_aliasing(function, args, kwargs, wrapped) if here else wrapped


class Backend:
    """What torch asks the module of a device for, as `torch.cuda` is."""

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def install() -> None:
    global _library
    # Backward on the calling thread: one of autograd's own that still lets go of Python's objects when the interpreter
    # ends takes the process with it.
    torch.autograd.set_multithreading_enabled(False)
    _setup_privateuseone_for_python_backend(NAME, Backend())
    _library = torch.library.Library("aten", "IMPL")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(aten, packet), overload or "default")
        _library.impl(name, lambda *args, _of=function, **kwargs: run(_of, args, kwargs), "PrivateUse1")


def install_with_kernel() -> None:
    """With a stand-in for the varlen kernel, as a card has one."""
    import kernel
    from sft.model import varlen

    install()
    Tensor.is_cuda = True
    varlen.varlen_attn = kernel.varlen_attn
    varlen._has_flash_attention = lambda device: True


def mistakes_are_found() -> None:
    """Fails where the device isn't one."""
    install()
    weight = torch.ones(2, 2).to(f"{NAME}:0").requires_grad_()
    (weight @ torch.ones(2, 2).to(f"{NAME}:0")).sum().backward()
    assert weight.grad is not None
    assert weight.grad.cpu().tolist() == [[2, 2], [2, 2]] and weight.grad.device.type == NAME
    mistakes: list[Callable[[], object]] = [
        lambda: weight @ torch.ones(2, 2),
        lambda: torch.rand(2, generator=torch.Generator(), device=f"{NAME}:0"),
        lambda: weight.detach().numpy(),
    ]
    for mistake in mistakes:
        with pytest.raises((RuntimeError, TypeError)):
            mistake()


class Card(Accelerator):
    """For Lightning."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}


class CountSyncs(Callback):
    """Writes to `path` what made the host wait in each optimizer step but the last, to the start of the next, and in
    each validation batch."""

    def __init__(self, path: str) -> None:
        self.path, self.steps, self.validation = Path(path), [], []

    def on_validation_batch_start(self, *_: Any) -> None:
        syncs.clear()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validation.append(list(syncs))

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.steps.append(list(syncs))
            syncs.clear()
            self.path.write_text(json.dumps({"steps": self.steps[1:], "validation": self.validation}))
