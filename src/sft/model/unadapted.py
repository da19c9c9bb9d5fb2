"""Linear layers that an adapter would change wrongly, or without effect.

Their code is asked, since peft takes each class that derives from a linear layer for one.
"""

import copy
import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A layer's weight in code, used otherwise than by a call of the layer. Part of a weight is used by BLOOM and the like
# alone, and only if they are asked to.
READ = re.compile(r"(?<!isinstance\()\bself\.(\w+)\.weight\b(?!\.(?:dtype|device|shape|data|_)|\[|\s*=)")


def left_out(model: "PreTrainedModel") -> dict[str, str]:
    """Their names, each with why."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D):
            continue
        parent, _, last = name.rpartition(".")
        owner: Any = type(model.get_submodule(parent))
        if isinstance(module, nn.Linear) and _is_of_its_own(module):
            found[name] = f"no linear layer, but a {type(module).__name__}"
        elif last in _weights_read_by(owner):
            found[name] = f"whose weight {owner.__name__} may use by itself, so that an adapter would have no effect"
    return found


def _is_of_its_own(module: Any) -> bool:
    """Whether a module that derives from a linear layer computes something else, as routers do.

    Its code is run, with small weights. Those of bitsandbytes are linear layers, in 4 bits.
    """
    import torch
    from torch.nn.functional import linear

    kind = type(module)
    if kind.forward is torch.nn.Linear.forward or kind.__module__.startswith("bitsandbytes"):
        return False
    weight = torch.tensor([[1.0, 2.0, 4.0], [-3.0, 5.0, 1.0]], device="cpu")
    bias = None if module.bias is None else torch.tensor([7.0, -1.0], device="cpu")
    inputs = torch.tensor([[[1.0, -2.0, 3.0], [0.0, 4.0, -5.0]]], device="cpu")
    small = copy.copy(module)
    small.__dict__ |= {"_parameters": {"weight": weight, "bias": bias}, "in_features": 3, "out_features": 2}
    try:
        with torch.no_grad():
            found = kind.forward(small, inputs)
            return not (isinstance(found, torch.Tensor) and torch.equal(found, linear(inputs, weight, bias)))
    except Exception:  # whatever it needs beside an input
        return True


@functools.cache
def _weights_read_by(kind: Any) -> frozenset[str]:
    """The layers whose weights a module's code uses without calling them, as Mamba's does for its kernels."""
    try:
        code = inspect.getsource(kind)
    except (OSError, TypeError):
        return frozenset()
    return frozenset(READ.findall(code))
