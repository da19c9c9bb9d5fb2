"""FlashAttention inside torch (`torch.nn.attention.varlen`, from 2.10 on): one call for all samples of a row on CUDA.

Shape suffixes: T tokens of the row, H heads, G key/value heads, D head width (E where the values have another), N
samples.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

# What the kernel can be told, which differs: 2.10 has `is_causal`, 2.11 `window_size` and `scale`, 2.12 `enable_gqa`.
KERNEL_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
WIDEST_HEAD = 256  # of the kernel
# The operations behind it, for what it can't be told: of sinks it knows nothing.
forward, backward = torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward


def takes(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether the kernel can do it."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
        and (window is None or "window_size" in KERNEL_OPTIONS)
        and _has_flash_attention(query.device)
    )


@torch.compiler.assume_constant_result  # no part of a graph
def _has_flash_attention(device: torch.device) -> bool:
    """Compiled into torch for Ampere (compute capability 8.0) and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def attend(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
    chunk: int | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Causal attention within each sample, [1, T, H, E].

    Args:
        bounds: of the samples, int32 [N + 1].
        longest: tokens of the longest sample.
        window, chunk: see `visible.Visible`.
        sink_H: for each head a score of no token, which takes its share of the attention and has no value.
    """
    if chunk:
        cut = cut_bounds if torch.compiler.is_compiling() else _cut_once
        bounds, longest = cut(bounds, longest, chunk, query_1HTD.shape[2]), chunk
    out_width = value_1GTE.shape[-1]
    width = _kernel_width(max(query_1HTD.shape[-1], out_width))
    grouped = "enable_gqa" in KERNEL_OPTIONS
    rows = (query_1HTD, key_1GTD, value_1GTE) if grouped else ungrouped(query_1HTD, key_1GTD, value_1GTE)
    # [T, H, D]; zeros at the end of a head change no score, and what they make of the values is cut off below.
    query, key, value = (_widened(row[0].transpose(0, 1), width) for row in rows)
    if sink_H is not None:
        out: Tensor = _WithSinks.apply(query, key, value, sink_H, bounds, longest, scale, window)
    else:
        options: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if grouped else {}
        if "scale" in KERNEL_OPTIONS:
            options["scale"] = scale
        elif scale != width**-0.5:
            query = query * (scale * width**0.5)
        if "window_size" in KERNEL_OPTIONS:
            options["window_size"] = (window - 1 if window else -1, 0)
        else:
            options["is_causal"] = True
        out = varlen_attn(query, key, value, bounds, bounds, longest, longest, **options)
    return (out if out_width == width else out[..., :out_width])[None]


class _WithSinks(torch.autograd.Function):
    """The kernel with a sink for each head, whose score joins the others' in the softmax.

    With lse = log Σ exp(score) of the kernel and lse' = log(exp(lse) + exp(sink)), out' = out · exp(lse - lse'). The
    kernel's backward pass (FlashAttention-2, arXiv 2307.08691, algorithm 2) takes p = exp(score - lse) and
    dscore = p · (dp - Σ dout · out), so with lse' and out' it is the one with the sink, whose own value is 0:
    dsink = -Σ_t exp(sink - lse') · Σ dout · out'.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_THD: Tensor,
        key_TGD: Tensor,
        value_TGD: Tensor,
        sink_H: Tensor,
        bounds: Tensor,
        longest: int,
        scale: float,
        window: int | None,
    ) -> Tensor:
        # As varlen_attn calls them: without dropout, and causal means without a window.
        window_size = {"window_size_left": window - 1 if window else -1, "window_size_right": 0}
        samples = bounds, bounds, longest, longest, 0.0, window is None
        rows = query_THD, key_TGD, value_TGD
        out_THD, lse_HT, *_ = forward(*rows, *samples, False, scale=scale, **window_size)
        sink_H1 = sink_H[:, None].to(torch.float32, copy=True)  # the parameter's memory is another's under ZeRO-3
        share_TH1 = (lse_HT - sink_H1).sigmoid().T[..., None]  # of the tokens
        out_THD = (out_THD * share_TH1).to(out_THD.dtype)
        ctx.save_for_backward(*rows, out_THD, torch.logaddexp(lse_HT, sink_H1), sink_H1, bounds)
        ctx.longest, ctx.options, ctx.sink_dtype = longest, {"scale": scale, **window_size}, sink_H.dtype
        ctx.causal = window is None
        return out_THD

    @staticmethod
    def backward(ctx: Any, grad_THD: Tensor) -> tuple[Tensor | None, ...]:
        *rows, out_THD, lse_HT, sink_H1, bounds = ctx.saved_tensors
        samples = bounds, bounds, ctx.longest, ctx.longest, 0.0, ctx.causal
        no_dropout = lse_HT.new_zeros(2, dtype=torch.uint64), lse_HT.new_empty(0)
        grads = backward(grad_THD, *rows, out_THD, lse_HT, *samples, *no_dropout, **ctx.options)
        by_token_HT = (sink_H1 - lse_HT).exp() * (grad_THD.float() * out_THD).sum(-1).T
        return *grads, -by_token_HT.sum(1).to(ctx.sink_dtype), None, None, None, None


def cut_bounds(bounds: Tensor, longest: int, chunk: int, num_tokens: int) -> Tensor:
    """The boundaries of the samples' chunks, of a length that the device needn't be asked for: what is over at the end
    are empty ones."""
    offsets = torch.arange(0, longest, chunk, dtype=bounds.dtype, device=bounds.device)
    starts = bounds[:-1, None] + offsets  # [N, chunks of the longest sample]
    starts = starts.where(starts < bounds[1:, None], num_tokens).flatten().sort().values
    return F.pad(starts[: len(bounds) - 1 + num_tokens // chunk], (0, 1), value=num_tokens)


@lru_cache(maxsize=1)
def _cut_once(bounds: Tensor, longest: int, chunk: int, num_tokens: int) -> Tensor:
    """Once a batch: the boundaries are the same tensor in every layer."""
    return cut_bounds(bounds, longest, chunk, num_tokens)


def ungrouped(query_1HTD: Tensor, key_1GTD: Tensor, value_1GTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With as many heads of keys and values as of queries."""
    num = query_1HTD.shape[1] // key_1GTD.shape[1]
    if num == 1:
        return query_1HTD, key_1GTD, value_1GTE
    return query_1HTD, key_1GTD.repeat_interleave(num, dim=1), value_1GTE.repeat_interleave(num, dim=1)


def _kernel_width(width: int) -> int:
    """The narrowest head of at least this width that every card has a backward pass for: of multiples of 8, and not of
    200 to 224, which compute capabilities 8.6, 8.9 and 12 lack."""
    return WIDEST_HEAD if width > 192 else -(-width // 8) * 8


def _widened(rows_THD: Tensor, width: int) -> Tensor:
    missing = width - rows_THD.shape[-1]
    return F.pad(rows_THD, (0, missing)) if missing else rows_THD
