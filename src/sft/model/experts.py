"""Experts of a mixture, all in one grouped product: what transformers does by default, in autocast's arithmetic too.

Its own multiplies in the dtype of the weights, whatever autocast says: in a run of bf16-mixed in fp32, for which CUDA
has no grouped kernel. And the kernel refuses rows that aren't aligned.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from sft.model.router import NUM_EXPERTS

NAME = "grouped"  # as transformers knows it
THEIRS = "grouped_mm"  # their default, where a family's experts can be grouped
ROUNDED_ON = ("cuda",)  # where autocast's arithmetic is faster in a grouped product; processors emulate bf16
ALIGNED = 16  # bytes, of which the kernel wants each row to be a multiple


def grouped_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' weighted sum for each token, [tokens, channels]; `self` is a module that holds all of them."""
    device = hidden_states.device.type
    weights: dict[str, Tensor] = {name: weight for name, weight in self._parameters.items() if weight is not None}
    rounded = {}
    if device in ROUNDED_ON and torch.is_autocast_enabled(device):
        rounded = {name: weight.to(torch.get_autocast_dtype(device)) for name, weight in weights.items()}
    stacked = [weight for weight in (rounded or weights).values() if weight.dim() == 3]
    aligned = all(weight.shape[-1] * weight.itemsize % ALIGNED == 0 for weight in stacked)
    forward = grouped_mm_experts_forward if aligned else batched_mm_experts_forward
    self.__dict__.update(rounded)  # found before the parameters of the same names
    try:
        out: Tensor = forward(self, hidden_states, top_k_index, top_k_weights)
    finally:
        for name in rounded:
            del self.__dict__[name]
    return out


def group(model: PreTrainedModel) -> None:
    """Has the experts of a model computed so, where transformers would group them."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_experts_implementation", None) == THEIRS:
            config._experts_implementation_internal = NAME


def kernel(model: PreTrainedModel) -> str | None:
    """What computes a model's experts; None where it has none."""
    config = model.config.get_text_config()
    if not any((getattr(config, name, None) or 0) > 1 for name in NUM_EXPERTS):
        return None
    known = {NAME: "one grouped product", "eager": "a product for each expert"}
    return known.get(name := getattr(config, "_experts_implementation", None) or "eager", name)


ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts)
