"""Why the samples of a model don't share a row, in words. What is known of kinds of layers helps a message alone."""

import re
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel

import sft
from sft.errors import UserError

# Class names of layers that hold a state, and the packages (with their modules) whose kernels keep samples apart.
KERNELS = (
    ("Mamba", {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}),
    ("DeltaNet|KimiDelta|GatedLinear", {"flash-linear-attention": "fla", "causal-conv1d": "causal_conv1d"}),
    ("ShortConv", {"causal-conv1d": "causal_conv1d"}),
)

STATES = "|".join([*(pattern for pattern, _ in KERNELS), "Recurrent|RgLru|RWKV|Rwkv|LSTM|LightningAttention"])
FAULTS = AssertionError, AttributeError, KeyError, NameError  # of code that is wrong, where they come from it itself
CODE = Path(sft.__file__).parent


def name(model: PreTrainedModel) -> str:
    return str(model.config.get_text_config().model_type or type(model).__name__)


def advice(model: PreTrainedModel) -> str | None:
    """What would pack the samples of this model's layers; None where nothing is known of them, or it is installed."""
    kinds = {type(module).__name__ for module in model.modules()}
    for pattern, packages in KERNELS:
        if any(re.search(pattern, kind) for kind in kinds):
            missing = [package for package, module in packages.items() if find_spec(module) is None]
            on = "" if next(model.parameters()).is_cuda else "on a GPU "
            return f"{on}{' and '.join(missing)} would pack them" if missing else None
    return None


def recurrent(model: PreTrainedModel) -> bool:
    """Whether layers are known to hold a state, by their classes' names."""
    return any(re.search(STATES, type(module).__name__) for module in model.modules())


def raise_own(error: Exception) -> None:
    """Raises an exception that is a fault of this project's code, or of memory: neither tells of the model."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    ours = trace and Path(trace.tb_frame.f_code.co_filename).is_relative_to(CODE)
    if isinstance(error, torch.OutOfMemoryError) or (ours and isinstance(error, FAULTS)):
        raise error


def first_line(error: BaseException) -> str:
    """An exception in a line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UserError):
        return str(error).partition(": set ")[0]  # without the advice
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200].removesuffix(": ")
