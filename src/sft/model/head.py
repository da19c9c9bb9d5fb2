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
            returned = _logits(model, model.forward(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False))
        except Exception:  # whatever a model does between the two, which the stand-ins can't answer
            return False
    return returned is logits and logits._version == before


def logits_at(model: PreTrainedModel, batch: Batch, position_N: Tensor) -> Tensor:
    """The model's logits at these positions of a batch, [N, V]."""
    inputs = model_inputs(model, batch)
    if chooses_positions(model):
        return _logits(model, model(**inputs, logits_to_keep=position_N))[0]
    return _logits(model, model(**inputs))[0, position_N]


def in_place_of_head(
    model: PreTrainedModel, batch: Batch, position_N: Tensor, function: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """`function(hidden [N, C], the head's weight [V, C])` at these positions of a batch, of a model whose head is a
    plain matrix.

    It is computed within the model's own forward pass: a strategy that shards the weights gathers them by hooks on the
    modules it calls.
    """
    head, inputs = model.get_output_embeddings(), model_inputs(model, batch)
    chooses = chooses_positions(model)
    if chooses:
        inputs["logits_to_keep"] = position_N
    of_hidden = lambda hidden: function(hidden[0] if chooses else hidden[0, position_N], head.weight)  # noqa: E731
    with forward_replaced(head, of_hidden):
        return _logits(model, model(**inputs))


def _logits(model: PreTrainedModel, outputs: object) -> Tensor:
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
