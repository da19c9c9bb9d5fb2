"""The loss: the sum of −log p over the supervised tokens. Averaging is left to the caller, who knows all ranks.

    sum over samples of log Pr(y | x) = sum over supervised positions t of log p(token t | tokens before t)

Where the data have weights, each term is multiplied by its token's.

The backbone runs over every token, the head at supervised positions only. Where the head is one matrix the
logits are never held whole: each chunk of rows is turned into its loss and its gradients at once (the idea of
Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989), so that peak memory doesn't grow with the number
of supervised tokens times the vocabulary.

Shape suffixes: T tokens of the row, N supervised tokens, C hidden channels, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.data.batch import Batch

# Logits held at once, in elements. Smaller saves memory; larger feeds the matrix units.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


def model_inputs(batch: Batch) -> dict[str, object]:
    """What the model is called with: a flat row, its positions and its boundaries.

    `use_cache=False` and no `attention_mask`: either would let samples of a row see each other.
    """
    bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
    return {
        "input_ids": batch["input_ids"],
        "position_ids": batch["position_ids"],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }


def nll(model: PreTrainedModel, batch: Batch, *, plain_head: bool) -> Tensor:
    """Sum of weight · −log p over the batch's supervised tokens, float32 scalar.

    The loss is computed in the place of the head, within the model's own forward pass: a strategy that shards the
    weights gathers them by hooks on the modules it calls. The head is called once a batch, on every rank, also where
    no token is supervised, so ranks never wait for each other's collectives.

    Args:
        plain_head: whether the head is a plain matrix (`head_is_plain_matrix`); else the model makes its logits.
    """
    position_N = batch["predicting"]
    target_N, token_weight_N = batch["labels"][0, position_N + 1], batch["weights"]
    inputs = model_inputs(batch)
    if not plain_head:
        logits_NV = model(**inputs, logits_to_keep=position_N).logits[0]
        if token_weight_N is None:
            return F.cross_entropy(logits_NV.float(), target_N, reduction="sum")
        return -(_log_probs(logits_NV, target_N) * token_weight_N).sum()
    with head_replaced(model, partial(linear_nll, target_N=target_N, token_weight_N=token_weight_N)):
        return model(**inputs, logits_to_keep=position_N).logits


@torch.no_grad()
def token_log_probs(model: PreTrainedModel, batch: Batch, *, plain_head: bool) -> Tensor:
    """log p of each token given those before it in its sample, float32 [T]; 0 at first tokens."""
    token_T = batch["input_ids"][0]
    position_N = (batch["position_ids"][0] != 0).nonzero()[:, 0] - 1
    target_N = token_T[position_N + 1]
    inputs = model_inputs(batch)
    if plain_head:
        with head_replaced(model, partial(linear_log_probs, target_N=target_N)):
            log_prob_N = model(**inputs, logits_to_keep=position_N).logits
    else:
        log_prob_N = _log_probs(model(**inputs, logits_to_keep=position_N).logits[0], target_N)
    log_prob_T = torch.zeros(len(token_T), dtype=torch.float32, device=token_T.device)
    log_prob_T[position_N + 1] = log_prob_N
    return log_prob_T


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
            returned = model.forward(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=False).logits
        except Exception:  # whatever a model does between the two, which the stand-ins can't answer
            return False
    return returned is logits and logits._version == before


class _Outputs:
    """What a backbone returns: hidden states, and nothing else that it is asked for."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None


def head_replaced(model: PreTrainedModel, function: Callable[[Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
    """While it lasts the model returns, as its logits, `function(hidden [N, C], the head's weight [V, C])`."""
    head = model.get_output_embeddings()
    return forward_replaced(head, lambda hidden_1NC: function(hidden_1NC[0], head.weight))


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """While it lasts the module computes `forward`."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again


def linear_log_probs(hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor) -> Tensor:
    """log softmax(hidden @ weight.T)[target], float32 [N]."""
    rows = _chunk_rows(hidden_NC, len(weight_VC))
    chunks = zip(hidden_NC.split(rows), target_N.split(rows), strict=True)
    return torch.cat([_log_probs(F.linear(hidden, weight_VC), target) for hidden, target in chunks])


def _log_probs(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


def linear_nll(hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, token_weight_N: Tensor | None = None) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[target], each term times its token's weight if there are any; float32
    scalar; 0, with a graph, where N = 0."""
    dtype = weight_VC.dtype
    if torch.is_autocast_enabled(hidden_NC.device.type):
        dtype = torch.get_autocast_dtype(hidden_NC.device.type)
    return _LinearNLL.apply(hidden_NC, weight_VC, target_N, token_weight_N, dtype, torch.is_grad_enabled())


def _chunk_rows(hidden: Tensor, num_vocab: int) -> int:
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
        dtype: torch.dtype,
        with_grad: bool,
    ) -> Tensor:
        need_hidden = with_grad and ctx.needs_input_grad[0]
        need_weight = with_grad and ctx.needs_input_grad[1]
        weight = weight_VC.detach().to(dtype)
        grad_hidden = torch.empty_like(hidden_NC) if need_hidden else None
        # Summed over chunks, so in float32 whatever the matrices are in.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        total = hidden_NC.new_zeros((), dtype=torch.float32)
        rows = _chunk_rows(hidden_NC, weight.shape[0])
        for start in range(0, len(target_N), rows):
            chunk = slice(start, start + rows)
            hidden = hidden_NC[chunk].detach().to(dtype)
            target = target_N[chunk, None]
            logits = (hidden @ weight.T).float()
            # In place, and one exponential for loss and gradient: this tensor is most of the step's memory traffic.
            logits -= logits.amax(dim=-1, keepdim=True)
            logit_of_target = logits.gather(1, target)
            normalizer = logits.exp_().sum(dim=-1, keepdim=True)
            nll_of_target, scale = normalizer.log() - logit_of_target, torch.ones_like(normalizer)
            if token_weight_N is not None:
                scale = token_weight_N[chunk, None]
                nll_of_target *= scale
                normalizer /= scale  # so that the softmax comes out weighted, without a pass of its own
            total += nll_of_target.sum()
            if not (need_hidden or need_weight):
                continue
            softmax = logits.div_(normalizer)
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
                grad.mul_(grad_output.to(grad.dtype))
        return grad_hidden, grad_weight, None, None, None, None
