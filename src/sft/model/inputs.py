"""What a model is called with for a batch."""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.model.attention import NAME as PACKED


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, object]:
    """A flat row, its positions and its boundaries, as far as the model takes them.

    `use_cache=False` and no `attention_mask`: either would let samples of a row see each other. Boundaries are given
    wherever the model's code takes them: transformers' guess from `position_ids` is wrong where those have three rows
    (its issues 44911, 47342). By its own attention, which knows none, a model is called as its authors call it.
    """
    inputs: dict[str, object] = {"input_ids": batch["input_ids"], "use_cache": False}
    if is_own(model):
        assert len(batch["counts"]) == 1, "the model's own attention doesn't keep samples apart"
    else:
        bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
        inputs |= {"position_ids": batch["position_ids"], "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": longest, "max_length_k": longest}
        if len(batch["counts"]) > 1:  # kernels of recurrent layers; without them their code refuses boundaries
            inputs |= {name: BOUNDARIES[name](batch) for name in recurrent_boundaries(model)}
    parameters = _parameters(type(model).forward)
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return inputs if takes_any else {name: value for name, value in inputs.items() if name in parameters}


def is_own(model: PreTrainedModel) -> bool:
    """Whether its attention is one that knows no boundaries of samples."""
    return not knows_bounds(str(model.config.get_text_config()._attn_implementation))


def knows_bounds(attention: str) -> bool:
    """Whether an attention, by the name that transformers knows it by, keeps samples of a row apart."""
    return attention == PACKED or attention.startswith("flash")


@cache
def _parameters(forward: Callable[..., object]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(forward).parameters)


def chooses_positions(model: PreTrainedModel) -> bool:
    """Whether the model runs its head at the positions `logits_to_keep` alone. One that takes any argument may ignore
    this one, so it must be named."""
    return "logits_to_keep" in _parameters(type(model).forward)


def _number_of_sample(batch: Batch) -> Tensor:
    """int32 [1, T]"""
    length_S = batch["cu_seqlens"].diff()
    number_S = torch.arange(len(length_S), dtype=torch.int32, device=length_S.device)
    return torch.repeat_interleave(number_S, length_S, output_size=batch["input_ids"].shape[1])[None]


BOUNDARIES: dict[str, Callable[[Batch], Tensor]] = {
    "seq_idx": _number_of_sample,
    "cu_seqlens": lambda batch: batch["cu_seqlens"],
}
_FOUND: "WeakKeyDictionary[PreTrainedModel, list[str]]" = WeakKeyDictionary()


def recurrent_boundaries(model: PreTrainedModel) -> list[str]:
    """The names by which the kernels of the model's recurrent layers take boundaries, by the text of its code: layers
    hand their keyword arguments on, so that no signature has them.

    `seq_idx` is that of causal-conv1d and mamba-ssm; `cu_seqlens` that of flash-linear-attention, where the layers
    don't make it of `cu_seq_lens_q` themselves, beside which it would be given twice.
    """
    if model not in _FOUND:
        files = {
            type(module).__module__ for module in model.modules() if not type(module).__module__.startswith("torch.")
        }
        source = "".join(_source(name) for name in sorted(files))
        found = ["seq_idx"] if any(word in source for word in ("seq_idx", "causal_conv1d", "mamba_ssm")) else []
        found += ["cu_seqlens"] if '"fla")' in source and "cu_seqlens=kwargs" not in source else []
        _FOUND[model] = found
    return _FOUND[model]


@cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):  # there is no file of it
        return ""
