"""The model is proven on a few samples of its own first: that it computes here what its authors wrote.

Three ways of the same samples are compared, on the real weights and device, in log-probabilities and in gradients:

    own     the model's own attention, each sample alone: what its authors wrote
    alone   the attention of this project, each sample alone
    packed  the same attention, the samples in one row

Where `alone` differs from `own`, the model's own attention is used; where `packed` differs, the samples of a
micro-batch run apart. A model that neither helps is refused. No list of names decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.errors import UserError
from sft.model.attention import NAME as PACKED
from sft.model.isolation import Isolation, attending, one_by_one, own_attention
from sft.model.loss import token_log_probs

AUTO, OWN, APART = "auto", "own", "apart"  # with PACKED, the values of model.attention and model.isolate
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Proof:
    """What was found."""

    isolation: Isolation
    reason: str | None = None  # why it is another than was hoped for, and what that costs
    differences: Mapping[str, float] = field(default_factory=dict)  # from `own`, by way


def prove(model: PreTrainedModel, batch: Batch, *, attention: str, isolate: str, plain_head: bool) -> Proof:
    """How the samples of a model are to be kept from one another, found on those of `batch`, two or three short ones.

    Args:
        attention: auto, packed, own, or another name that transformers knows.
        isolate: auto, packed or apart.

    Raises:
        UserError: the settings ask for what the model can't do, or nothing helps.
    """
    own = own_attention(model)
    ours = PACKED if attention == AUTO else own if attention == OWN else attention

    def measure(name: str, apart: bool) -> Tensor | None:
        batches = one_by_one(batch) if apart else [batch]
        training = [module for module in model.modules() if module.training]
        try:
            model.eval()
            with attending(model, name):
                return torch.cat([token_log_probs(model, part, plain_head=plain_head) for part in batches]).double()
        except Exception:  # whatever a model has against it
            return None
        finally:
            for module in training:
                module.training = True

    expected = measure(own, True)
    if expected is None:
        raise UserError("the model fails by its own attention")

    def difference(got: Tensor | None) -> float:
        return float("inf") if got is None else float((got - expected).abs().max())

    differences = {"alone": difference(measure(ours, True)), "packed": difference(measure(ours, False))}
    if differences["alone"] > TOLERANCE:
        return Proof(Isolation(own, True), "its attention is not ours", differences)
    if differences["packed"] > TOLERANCE or isolate == APART:
        return Proof(Isolation(ours, True), "samples of a row see each other", differences)
    return Proof(Isolation(ours), None, differences)
