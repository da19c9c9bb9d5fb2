"""The loss: the sum of −log p over the supervised tokens, and their number. Whoever knows the world averages.

    sum over samples of log Pr(y | x) = sum over supervised positions t of log p(token t | tokens before t)

The backbone runs over every token, the head at supervised positions only. Where the head is one matrix the
logits are never held whole: each chunk of rows is turned into its loss and its gradients at once (the idea of
Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989), so that peak memory doesn't grow with the number
of supervised tokens times the vocabulary.

Shape suffixes: T tokens of the row, N supervised tokens, C hidden channels, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.data.tokenization import IGNORE

# Logits held at once, in elements. Smaller saves memory; larger feeds the matrix units.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


def supervised(labels_1T: Tensor) -> tuple[Tensor, Tensor]:
    """Positions whose next token is supervised, and those tokens: two int64 [N].

    The first token of a sample is never supervised, so the shift by one never crosses two samples of a row.
    """
    position_N = (labels_1T[0, 1:] != IGNORE).nonzero()[:, 0]
    return position_N, labels_1T[0, 1:][position_N]


def model_inputs(batch: Any) -> dict[str, Any]:
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


class Objective:
    """`objective(model, batch)` gives (sum of −log p, number of supervised tokens) of a causal LM.

    `plain_head` is None until the first batch with a supervised token; then True where the model's logits are
    exactly hidden states times one matrix, and False where the head is more than that (soft-capping, a logit
    scale, a bias): such a model's own forward makes the logits.
    """

    def __init__(self) -> None:
        self.plain_head: bool | None = None

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        position_N, target_N = supervised(batch["labels"])
        inputs = model_inputs(batch)
        if self.plain_head is None and len(position_N):
            self.plain_head = head_is_one_matrix(model, inputs, position_N[:64])
        if self.plain_head is False:
            logits_NV = model(**inputs, logits_to_keep=position_N).logits[0]
            return F.cross_entropy(logits_NV.float(), target_N, reduction="sum"), len(target_N)
        hidden_NC = model.base_model(**inputs).last_hidden_state[0, position_N]
        return linear_nll(hidden_NC, model.get_output_embeddings().weight, target_N), len(target_N)

    @torch.no_grad()
    def token_log_probs(self, model: Any, batch: Any) -> Tensor:
        """log p of each token given those before it in its sample, float32 [T]; 0 at first tokens."""
        inputs, token_T = model_inputs(batch), batch["input_ids"][0]
        log_prob_T = torch.zeros(len(token_T), dtype=torch.float32, device=token_T.device)
        position_N = (batch["position_ids"][0] != 0).nonzero()[:, 0] - 1
        if not len(position_N):
            return log_prob_T
        if self.plain_head is None:
            self.plain_head = head_is_one_matrix(model, inputs, position_N[:64])
        if self.plain_head:
            weight_VC = model.get_output_embeddings().weight
            hidden_NC = model.base_model(**inputs).last_hidden_state[0, position_N]
            rows = _chunk_rows(hidden_NC, len(weight_VC))
            chunks = (F.linear(hidden, weight_VC) for hidden in hidden_NC.split(rows))
        else:
            logits_NV = model(**inputs, logits_to_keep=position_N).logits[0]
            rows = _chunk_rows(logits_NV, logits_NV.shape[1])
            chunks = iter(logits_NV.split(rows))
        for position, logits in zip(position_N.split(rows), chunks, strict=True):
            log_prob_T[position + 1] = -F.cross_entropy(logits.float(), token_T[position + 1], reduction="none")
        return log_prob_T


@torch.no_grad()
def head_is_one_matrix(model: Any, inputs: dict[str, Any], position_N: Tensor) -> bool:
    """Whether the model's logits equal hidden states times the head's matrix, bit for bit.

    Both come from one forward pass, so the same product of the same numbers must give the same bits; anything
    the model does besides it shows, even where it is too small for a tolerance.
    """
    kept: list[Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _m, _i, out: kept.append(out.last_hidden_state))
    training = model.training
    model.eval()  # so that dropout draws no random number that an uninterrupted run would not draw
    try:
        logits = model(**inputs, logits_to_keep=position_N).logits
    finally:
        hook.remove()
        model.train(training)
    head = model.get_output_embeddings()
    return head is not None and torch.equal(F.linear(kept[0][:, position_N], head.weight), logits)


def linear_nll(hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor) -> Tensor:
    """Sum of −log softmax(hidden @ weight.T)[target], float32 scalar; 0, with a graph, where N = 0."""
    dtype = weight_VC.dtype
    if torch.is_autocast_enabled(hidden_NC.device.type):
        dtype = torch.get_autocast_dtype(hidden_NC.device.type)
    return _LinearNLL.apply(hidden_NC, weight_VC, target_N, dtype, torch.is_grad_enabled())


def _chunk_rows(hidden: Tensor, num_vocab: int) -> int:
    return max(16, CHUNK_ELEMENTS.get(hidden.device.type, 2**27) // num_vocab)


class _LinearNLL(torch.autograd.Function):
    """Loss and gradients of one chunk of rows at a time; d(−log p)/d(logits) = softmax − one-hot."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, target_N: Tensor, dtype: torch.dtype, with_grad: bool
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
            total += (normalizer.log() - logit_of_target).sum()
            if not (need_hidden or need_weight):
                continue
            softmax = logits.div_(normalizer)
            grad = softmax.scatter_add_(1, target, -torch.ones_like(normalizer)).to(dtype)
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
        return grad_hidden, grad_weight, None, None, None
