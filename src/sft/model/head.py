"""What a model does between its head and its logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.errors import UserError
from sft.model.inputs import chooses_positions, model_inputs


def head_is_plain_matrix(model: PreTrainedModel) -> bool:
    """Whether the model returns the product of the head's input with one matrix, and does nothing to it.

    Then the logits need never be held whole. A head with a bias or an adapter, soft-capping or a scale makes its own
    logits. The model's forward pass is asked, with stand-ins for its backbone and its head: no weight is read, so the
    answer is the same on every rank and under every strategy, also before there are weights.
    """
    head, backbone = model.get_output_embeddings(), model.base_model
    if type(head) is not nn.Linear or head.bias is not None or backbone is model:
        return False
    hidden = torch.zeros(1, 1, head.in_features, dtype=head.weight.dtype)
    logits = torch.zeros(1, 1, 2, dtype=head.weight.dtype)
    before = logits._version
    with forward_replaced(backbone, lambda *_, **__: _Outputs(hidden)), forward_replaced(head, lambda _: logits):
        try:  # not by a call of the model, whose hooks would gather weights
            given = returned(model, model.forward(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False))
        except Exception:  # whatever a model does between the two, which the stand-ins can't answer
            return False
    return given is logits and logits._version == before


def call_at(model: PreTrainedModel, batch: Batch, position_N: Tensor) -> tuple[dict[str, object], Tensor | slice]:
    """What the model is called with for these positions of a batch, and where they stand in its head's input and its
    logits: of a model that can't be told, the head sees every position."""
    inputs = model_inputs(model, batch)
    if chooses_positions(model):
        return inputs | {"logits_to_keep": position_N}, slice(None)
    return inputs, position_N


def logits_at(model: PreTrainedModel, batch: Batch, position_N: Tensor) -> Tensor:
    """The model's logits at these positions of a batch, [N, V]."""
    inputs, at = call_at(model, batch, position_N)
    return returned(model, model(**inputs))[0, at]


def returned(model: PreTrainedModel, outputs: object) -> Tensor:
    """The logits of what a model returned, or what was computed in their place."""
    logits = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    raise UserError(f"{type(model).__name__} returns no logits: it can't be trained as a causal language model")


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the product of the head's input with its weight."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Outputs:
    """What a backbone returns: hidden states, and nothing else that it is asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """While it lasts the module computes `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again
