"""What a model is called with for a batch."""

import inspect
from collections.abc import Callable
from functools import cache

from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.model.attention import NAME as PACKED


def model_inputs(model: PreTrainedModel, batch: Batch) -> dict[str, object]:
    """A flat row, its positions and its boundaries, as far as the model takes them.

    `use_cache=False` and no `attention_mask`: either would let samples of a row see each other.
    """
    if is_own(model):  # as its authors call it; it is one sample
        assert len(batch["cu_seqlens"]) == 2, "the model's own attention doesn't keep samples apart"
        inputs: dict[str, object] = {"input_ids": batch["input_ids"], "use_cache": False}
        return _taken(model, inputs)
    bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
    inputs = {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }
    return _taken(model, inputs)


def is_own(model: PreTrainedModel) -> bool:
    """Whether its attention is one that knows no boundaries of samples."""
    name = str(model.config.get_text_config()._attn_implementation)
    return not (name == PACKED or name.startswith("flash"))


def _taken(model: PreTrainedModel, inputs: dict[str, object]) -> dict[str, object]:
    names = taken(type(model).forward)
    return inputs if names is None else {name: value for name, value in inputs.items() if name in names}


@cache
def taken(forward: Callable[..., object]) -> frozenset[str] | None:
    """The names of the arguments that a model's forward pass takes; None: any."""
    parameters = inspect.signature(forward).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return None if takes_any else frozenset(parameters)
