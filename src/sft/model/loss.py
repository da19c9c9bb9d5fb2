"""The loss: the sum of −log p over the supervised tokens. Averaging is left to the caller, who knows all ranks.

    sum over samples of log Pr(y | x) = sum over supervised positions t of log p(token t | tokens before t)

Where the data have weights, each term is multiplied by its token's. `Objective` may add to each term.

The backbone runs over every token, the head at supervised positions only. Where the head is one matrix the
logits are never held whole: each chunk of rows is turned into its loss and its gradients at once (the idea of
Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989), so that peak memory doesn't grow with the number
of supervised tokens times the vocabulary.

Shape suffixes: T tokens of the row, N supervised tokens, C hidden channels, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch
from sft.model.head import call_at, forward_replaced, logits_at, product_dtype, returned
from sft.model.head import head_is_plain_matrix as head_is_plain_matrix


@dataclass(frozen=True)
class Objective:
    """The settings of `loss` in conf/train.yaml. With p_v the probability of token v, y the token that comes, V their
    number and Z the normalizer of the softmax, the term of a supervised token is −log p_y

        + label_smoothing · (mean over v of −log p_v + log p_y)     (arXiv 1512.00567)
        + z_loss · (log Z)²                                         (PaLM, arXiv 2204.02311)

    and d(term)/d(logit v) = (1 + 2 · z_loss · log Z) p_v − (1 − label_smoothing) [v = y] − label_smoothing / V.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    router_aux: float = 0.0  # of sft.model.router

    def parts(self, nll: Tensor, log_z: Tensor, mean_logit: Tensor) -> Tensor:
        """The three parts of each row's term, [3, ...]."""
        smoothing = self.label_smoothing * (log_z - mean_logit - nll)
        return torch.stack([nll, smoothing, self.z_loss * log_z**2])


# Logits held at once, in elements. Smaller saves memory; larger feeds the matrix units.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


def nll(model: PreTrainedModel, batch: Batch, *, plain_head: bool, objective: Objective | None = None) -> Tensor:
    """Sum of weight · −log p over the batch's supervised tokens, float32 scalar; [3] with an `objective`'s other parts.

    The loss is computed in the place of the head, within the model's own forward pass: a strategy that shards the
    weights gathers them by hooks on the modules it calls. The head is called once a batch, on every rank, also where
    no token is supervised, so ranks never wait for each other's collectives.

    Args:
        plain_head: whether the head is a plain matrix (`head_is_plain_matrix`); else the model makes its logits.
    """
    adds = objective if objective and (objective.label_smoothing or objective.z_loss) else None
    position_N = batch["predicting"]
    target_N, token_weight_N = batch["labels"][0, position_N + 1], batch["weights"]
    if not plain_head:
        logits_NV = logits_at(model, batch, position_N)
        if adds:
            logits_NV = logits_NV.float()
            parts_3N = adds.parts(-_log_probs(logits_NV, target_N), logits_NV.logsumexp(-1), logits_NV.mean(-1))
            return (parts_3N if token_weight_N is None else parts_3N * token_weight_N).sum(1)
        if token_weight_N is None:
            return F.cross_entropy(logits_NV.float(), target_N, reduction="sum")
        return -(_log_probs(logits_NV, target_N) * token_weight_N).sum()
    head, (inputs, at) = model.get_output_embeddings(), call_at(model, batch, position_N)
    with forward_replaced(head, lambda hidden: linear_nll(hidden[0, at], head.weight, target_N, token_weight_N, adds)):
        return returned(model, model(**inputs))


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, batch: Batch, *, plain_head: bool) -> Tensor:
    """log p of each token given those before it in its sample, float32 [T]; 0 at first tokens."""
    return graph_log_probs(model, batch, plain_head=plain_head)


def graph_log_probs(model: PreTrainedModel, batch: Batch, *, plain_head: bool, since: int = 0) -> Tensor:
    """The same, with a graph for its gradient; 0 before the token `since`, where the head doesn't run."""
    token_T = batch["input_ids"][0]
    wanted_T = batch["position_ids"][0] != 0
    wanted_T[:since] = False
    position_N = wanted_T.nonzero()[:, 0] - 1
    target_N = token_T[position_N + 1]
    if plain_head:
        head, (inputs, at) = model.get_output_embeddings(), call_at(model, batch, position_N)
        with forward_replaced(head, lambda hidden: linear_log_probs(hidden[0, at], head.weight, target_N)):
            log_prob_N = returned(model, model(**inputs))
    else:
        log_prob_N = _log_probs(logits_at(model, batch, position_N), target_N)
    log_prob_T = torch.zeros(len(token_T), dtype=torch.float32, device=token_T.device)
    return log_prob_T.index_copy(0, position_N + 1, log_prob_N)


def linear_log_probs(hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target], float32 [N]."""
    rows = chunk_rows(hidden_NC, len(weight_VC))
    chunks = zip(hidden_NC.split(rows), target_N.split(rows), strict=True)
    return torch.cat([_log_probs(F.linear(hidden, weight_VC), target) for hidden, target in chunks])


def _log_probs(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def linear_nll(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    target_N: Tensor,
    token_weight_N: Tensor | None = None,
    adds: Objective | None = None,
) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[target], each term times its token's weight if there are any; float32
    scalar, or [3] as of `nll`; 0, with a graph, where N = 0."""
    dtype = product_dtype(hidden_NC, weight_VC)
    return _LinearNLL.apply(hidden_NC, weight_VC, target_N, token_weight_N, adds, dtype, torch.is_grad_enabled())


def chunk_rows(hidden: Tensor, num_vocab: int) -> int:
    return max(16, CHUNK_ELEMENTS.get(hidden.device.type, 2**27) // num_vocab)


class _LinearNLL(torch.autograd.Function):
    """Loss and gradients of one chunk of rows at a time; d(w · −log p)/d(logits) = w · (softmax − one-hot)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NC: Tensor,
        weight_VC: Tensor,
        target_N: Tensor,
        token_weight_N: Tensor | None,
        adds: Objective | None,
        dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        need_hidden = with_grad and ctx.needs_input_grad[0]
        need_weight = with_grad and ctx.needs_input_grad[1]
        weight = weight_VC.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden_NC) if need_hidden else None
        # Summed over chunks, so in float32 whatever the matrices are in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden_NC.new_zeros((3,) if adds else (), dtype=torch.float32)
        rows = chunk_rows(hidden_NC, weight.shape[0])
        for start in range(0, len(target_N), rows):
            chunk = slice(start, start + rows)
            hidden = hidden_NC[chunk].detach().to(dtype)
            target = target_N[chunk, None]
            logits = (hidden @ weight.T).float()
            # In place, and one exponential for loss and gradient: this tensor is most of the step's memory traffic.
            largest = logits.amax(dim=-1, keepdim=True)
            mean = logits.mean(dim=-1, keepdim=True) if adds else None
            logits -= largest
            logit_of_target = logits.gather(1, target)
            normalizer = logits.exp_().sum(dim=-1, keepdim=True)
            nll_of_target, scale = normalizer.log() - logit_of_target, torch.ones_like(normalizer)
            parts = nll_of_target[None]
            if adds and mean is not None:
                log_z = normalizer.log() + largest
                parts = adds.parts(nll_of_target, log_z, mean)
                normalizer /= 1 + 2 * adds.z_loss * log_z
            if token_weight_N is not None:
                scale = token_weight_N[chunk, None]
                parts *= scale
                normalizer /= scale  # so that the softmax comes out weighted, without a pass of its own
            total += parts.sum(dim=(1, 2)) if adds else parts.sum()
            if not (need_hidden or need_weight):
                continue
            softmax = logits.div_(normalizer)
            if adds:
                softmax -= scale * (adds.label_smoothing / logits.shape[1])
                scale = scale * (1 - adds.label_smoothing)
            grad = softmax.scatter_add_(1, target, -scale).to(dtype)
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight
            if grad_weight is not None:
                if dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden)
                else:
                    grad_weight += grad.T @ hidden
        ctx.grads = grad_hidden, grad_weight.to(weight_VC.dtype) if grad_weight is not None else None
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second copy of the head's gradient would be the largest tensor of the step.
        grad_hidden, grad_weight = ctx.grads
        del ctx.grads
        for grad in (grad_hidden, grad_weight):
            if grad is not None:
                grad.mul_(grad_output.reshape(-1)[0].to(grad.dtype))  # the same of all parts
        return grad_hidden, grad_weight, None, None, None, None, None
