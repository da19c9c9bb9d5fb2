"""The loss: the sum of −log p over the supervised tokens, and their number. Whoever knows the world averages.

    sum over samples of log Pr(y | x) = sum over supervised positions t of log p(token t | tokens before t)

The backbone runs over every token, the head at supervised positions only. Where the head is one matrix the
logits are never held whole: each chunk of rows is turned into its loss and its gradients at once (the idea of
Liger-Kernel's fused linear cross-entropy, arXiv 2410.10989), so that peak memory doesn't grow with the number
of supervised tokens times the vocabulary.

Shape suffixes: T tokens of the row, N supervised tokens, C hidden channels, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Logits held at once, in elements. Smaller saves memory; larger feeds the matrix units.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}


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

    The loss is computed in the place of the head, within the model's own forward pass: a strategy that shards the
    weights gathers them by hooks on the modules it calls. The head is called once a batch, on every rank, also where
    no token is supervised, so ranks never wait for each other's collectives.

    `plain_head` is None until the first batch; then True where the head is one matrix and its product is what the
    model returns, and False where there is more to it (soft-capping, a scale, a bias, an adapter): such a model makes
    its own logits.
    """

    def __init__(self) -> None:
        self.plain_head: bool | None = None

    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        position_N = batch["predicting"]
        target_N = batch["labels"][0, position_N + 1]
        inputs = model_inputs(batch)
        if self.plain_head is None:
            self.plain_head = head_is_one_matrix(model, inputs)
        if not self.plain_head:
            logits_NV = model(**inputs, logits_to_keep=position_N).logits[0]
            return F.cross_entropy(logits_NV.float(), target_N, reduction="sum"), len(target_N)
        with head_replaced(model, lambda hidden, weight: linear_nll(hidden, weight, target_N)):
            return model(**inputs, logits_to_keep=position_N).logits, len(target_N)

    @torch.no_grad()
    def token_log_probs(self, model: Any, batch: Any) -> Tensor:
        """log p of each token given those before it in its sample, float32 [T]; 0 at first tokens."""
        inputs, token_T = model_inputs(batch), batch["input_ids"][0]
        position_N = (batch["position_ids"][0] != 0).nonzero()[:, 0] - 1
        target_N = token_T[position_N + 1]
        if self.plain_head is None:
            self.plain_head = head_is_one_matrix(model, inputs)

        def log_probs(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
            rows = _chunk_rows(hidden_NC, len(weight_VC))
            chunks = zip(hidden_NC.split(rows), target_N.split(rows), strict=True)
            return torch.cat([_log_probs(F.linear(hidden, weight_VC), target) for hidden, target in chunks])

        if self.plain_head:
            with head_replaced(model, log_probs):
                log_prob_N = model(**inputs, logits_to_keep=position_N).logits
        else:
            log_prob_N = _log_probs(model(**inputs, logits_to_keep=position_N).logits[0], target_N)
        log_prob_T = torch.zeros(len(token_T), dtype=torch.float32, device=token_T.device)
        log_prob_T[position_N + 1] = log_prob_N
        return log_prob_T


def _log_probs(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    return -F.cross_entropy(logits_NV.float(), target_N, reduction="none")


@contextmanager
def head_replaced(model: Any, function: Callable[[Tensor, Tensor], Tensor]) -> Iterator[None]:
    """While it lasts the model returns, as its logits, `function(hidden [N, C], the head's weight [V, C])`."""
    head = model.get_output_embeddings()
    head.forward = lambda hidden_1NC: function(hidden_1NC[0], head.weight)
    try:
        yield
    finally:
        del head.forward  # the class's own is seen again


@torch.no_grad()
def head_is_one_matrix(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether what the model returns is the product of the head's input with one matrix, bit for bit.

    The product is taken in the head's place and compared with the logits, so that anything done to them shows, even
    where it is too small for a tolerance.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        return False
    made: list[Tensor] = []

    def product(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
        made.append(F.linear(hidden_NC[None], weight_VC))
        return made[0]

    training = model.training
    model.eval()  # so that dropout draws no random number that an uninterrupted run would not draw
    first_few = torch.arange(min(64, inputs["input_ids"].shape[1]), device=inputs["input_ids"].device)
    try:
        with head_replaced(model, product):
            logits = model(**inputs, logits_to_keep=first_few).logits
    finally:
        model.train(training)
    return torch.equal(made[0], logits)


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
