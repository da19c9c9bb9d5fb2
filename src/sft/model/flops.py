"""Useful floating-point operations of a training step, and what a device can do of them: their ratio is the MFU."""

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from sft.checkpoint.layout import full_shape
from sft.model.language_part import rest
from sft.model.router import NUM_EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Dense matrix products, FLOP/s in bf16, TF32 and fp32, by part of the device's name: vendors' data sheets. The first
# that fits counts.
PEAKS = {
    "H100 PCIe": (756e12, 378e12, 51e12),
    "H100 NVL": (835e12, 417e12, 60e12),
    "H100": (989e12, 494e12, 67e12),
    "H200": (989e12, 494e12, 67e12),
    "GH200": (989e12, 494e12, 67e12),
    "B200": (2250e12, 1100e12, 75e12),
    "A100": (312e12, 156e12, 19.5e12),
    "L40S": (362e12, 183e12, 91.6e12),
    "RTX 4090": (165.2e12, 82.6e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12, 35.6e12),
}
FORMATS = ("bf16", "tf32", "fp32")
EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


def peak(device: str, number_format: str = "bf16") -> float | None:
    """What the data sheet says of a device; None where it isn't known here, or for a slice of a device (MIG)."""
    known = (rates for name, rates in PEAKS.items() if name in device and "MIG" not in device)
    rates = next(known, None)
    return rates[FORMATS.index(number_format)] if rates else None


@dataclass(frozen=True)
class Flops:
    """Useful operations of forward and backward.

    A weight takes 2 a token forward, 2 for the gradient of its input and 2 for its own, which a frozen one is spared: 6
    or 4. The head counts at supervised tokens alone. Attention's two products take, under the causal mask, 2 x (width
    of all heads) x (length of the sample) a token and layer forward and twice that backward. What is computed beyond
    (padding, masked scores, recomputation, a norm, an activation function) is not useful and doesn't count; without
    masks and with every token supervised this is the count of PaLM (arXiv 2204.02311, appendix B).
    """

    token: float  # of a token, in the layers' weights
    supervised: float  # of a supervised token, in the head
    square: float  # attention's, to be multiplied by the square of a sample's length

    def of(self, num_tokens: float, num_supervised: float, sum_squares: float) -> float:
        """Of samples with so many tokens, the squares of whose lengths add up to `sum_squares`."""
        return self.token * num_tokens + self.supervised * num_supervised + self.square * sum_squares


def of_model(model: "PreTrainedModel") -> Flops:
    """Those of a model as it is trained: which weights are frozen, and of experts those that a token chooses."""
    config = model.config.get_text_config()
    num_experts = next((n for field in NUM_EXPERTS if (n := getattr(config, field, None))), 1)
    active = (getattr(config, "num_experts_per_tok", None) or num_experts) / num_experts
    output = model.get_output_embeddings()
    heads = set(output.modules()) if output is not None else set()
    unused = {id(parameter) for parameter in rest(model).values()}  # which no text runs through
    body, head = 0.0, 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or "original_module" in name:  # peft's, whose copy is trained
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) in unused:
                continue
            each = 6 if parameter.requires_grad else 4
            if module in heads:
                head += each * _size(module, own, parameter)
            else:
                share = active if EXPERTS.search(f"{name}.{own}") else 1
                body += each * share * _size(module, own, parameter)
    kinds = getattr(config, "layer_types", None) or ["attention"] * (getattr(config, "num_hidden_layers", 0) or 0)
    num_heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or config.hidden_size // max(1, num_heads)
    with_scores = sum("linear" not in kind and "attention" in kind for kind in kinds)
    return Flops(body, head, 6.0 * with_scores * num_heads * width)


def _size(module: nn.Module, own: str, parameter: Any) -> int:
    """Numbers of a matrix, or of a stack of them, whatever it is stored as; 0 of a vector."""
    if isinstance(module, nn.Linear) and own == "weight":  # which in 4 bits is packed
        return module.in_features * module.out_features
    shape = full_shape(parameter)
    return prod(shape) if len(shape) > 1 else 0
