"""What is measured at each supervised token of a validation batch, from the same logits as the loss.

As in `loss.py`, the logits are never held whole where the head is one matrix: each chunk of rows is turned into a few
numbers a row. The sum of −log p is that of `loss.nll`, to the bit.

Shape suffixes: N supervised tokens, M fixed positions besides, R rows of a chunk, C hidden channels, V vocabulary.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.model.head import call_at, forward_replaced, logits_at, product_dtype, returned
from sft.model.inputs import chooses_positions
from sft.model.loss import chunk_rows

AtFixed = Callable[[Tensor, int], None]  # takes log-probabilities [R, V], and which of the M the first is of


@torch.no_grad()
def measured_nll(
    model: PreTrainedModel,
    batch: Batch,
    stop_ids: Tensor,
    *,
    plain_head: bool,
    at_fixed: AtFixed | None = None,
) -> tuple[Tensor, Tensor]:
    """The batch's sum of weight · −log p, as `loss.nll`, and float32 [4, N] of its supervised tokens: −log p, whether
    the most probable token is the one that comes, the probability of the stop tokens together, and whether the most
    probable token is a stop token.

    The head is called once a batch, on every rank. With `at_fixed` it also runs at the positions `batch["fixed"]` [M],
    whose log-probabilities over the vocabulary, float32, are given to `at_fixed` in chunks.
    """
    position_N, weight_N = batch["predicting"], batch["weights"]
    target_N, num = batch["labels"][0, position_N + 1], len(position_N)
    positions = position_N if at_fixed is None else torch.cat([position_N, batch["fixed"]])
    parts: list[Tensor] = []
    head = model.get_output_embeddings()

    if plain_head:

        def function(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
            dtype = product_dtype(hidden_NC, weight_VC)
            matrix, rows = weight_VC.to(dtype), chunk_rows(hidden_NC, len(weight_VC))

            def logits(chunk: Tensor) -> Tensor:
                return (chunk.to(dtype) @ matrix.T).float()

            sum_of_all = hidden_NC.new_zeros((), dtype=torch.float32)
            for start in range(0, num, rows):
                chunk = slice(start, min(start + rows, num))
                weight = None if weight_N is None else weight_N[chunk]
                total, part = _of_chunk(logits(hidden_NC[chunk]), target_N[chunk], weight, stop_ids)
                sum_of_all += total
                parts.append(part)
            for start in range(num, len(hidden_NC), rows):
                log_probs = logits(hidden_NC[start : start + rows]).log_softmax(-1)
                assert at_fixed is not None
                at_fixed(log_probs, start - num)
            return sum_of_all

        inputs, at = call_at(model, batch, positions)
        with forward_replaced(head, lambda hidden: function(hidden[0, at], head.weight)):
            total = returned(model, model(**inputs))
    else:
        # The head's products at the supervised tokens are those that they are without the other positions.
        apart: AbstractContextManager[None] = nullcontext()
        if at_fixed is not None and head is not None and chooses_positions(model):
            forward = head.forward
            parts_of = lambda hidden: (forward(hidden[:, :num]), forward(hidden[:, num:]))  # noqa: E731
            apart = forward_replaced(head, lambda hidden: torch.cat(parts_of(hidden), dim=1))
        with apart:
            logits_NV = logits_at(model, batch, positions)
        log_probs_NV = logits_NV[:num].float().log_softmax(-1)
        nll_N = F.nll_loss(log_probs_NV, target_N, reduction="none")
        total = F.nll_loss(log_probs_NV, target_N, reduction="sum") if weight_N is None else (nll_N * weight_N).sum()
        best_N, stop_N = log_probs_NV.argmax(-1), log_probs_NV[:, stop_ids].exp().sum(-1)
        parts.append(_stacked(nll_N, best_N, target_N, stop_N, stop_ids))
        if at_fixed is not None and len(logits_NV) > num:
            at_fixed(logits_NV[num:].float().log_softmax(-1), 0)
    return total, torch.cat(parts, 1) if parts else torch.zeros(4, 0, device=position_N.device)


def _of_chunk(logits_RV: Tensor, target_R: Tensor, weight_R: Tensor | None, stop_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of weight · −log p as `loss.linear_nll` makes it, operation for operation, and the chunk's measures."""
    target = target_R[:, None]
    largest, best = logits_RV.max(dim=-1, keepdim=True)
    logits_RV -= largest
    logit_of_target = logits_RV.gather(1, target)
    normalizer = logits_RV.exp_().sum(dim=-1, keepdim=True)
    nll = normalizer.log() - logit_of_target
    total = (nll if weight_R is None else nll * weight_R[:, None]).sum()
    stop = logits_RV[:, stop_ids].sum(-1) / normalizer[:, 0]
    return total, _stacked(nll[:, 0], best[:, 0], target_R, stop, stop_ids)


def _stacked(nll: Tensor, best: Tensor, target: Tensor, stop: Tensor, stop_ids: Tensor) -> Tensor:
    return torch.stack([nll, (best == target).float(), stop, torch.isin(best, stop_ids).float()])
