"""Attention for packs: each sample of a flat row attends to itself alone.

One name, `packed`, is registered with transformers; the tensors choose the kernel behind it:

- CUDA in bf16 or fp16: `torch.nn.attention.varlen.varlen_attn` (FlashAttention inside torch, no extra wheel);
- everything else: a call of scaled dot-product attention for each sample.

A run that sets `model.attention=flash_attention_2` (or 3) takes the user's own FlashAttention instead; it
reads the same `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`.

Shape suffixes: T tokens of the row, H heads, G key/value heads, D head width.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft.errors import UserError

NAME = "packed"


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of one flat row; returns [1, T, H, D] and no weights."""
    if s_aux is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks, which attention=packed doesn't compute: "
            "set model.attention=flash_attention_3 and install FlashAttention"
        )
    # A mask, or a missing boundary, would mean that the samples are not told apart: never guess here.
    assert attention_mask is None and cu_seq_lens_q is not None and query_1HTD.shape[0] == 1
    window = sliding_window if sliding_window and max_length_q and sliding_window < max_length_q else None
    heads_per_group = query_1HTD.shape[1] // key_1GTD.shape[1]
    if (
        query_1HTD.is_cuda
        and query_1HTD.dtype in (torch.bfloat16, torch.float16)
        and not softcap
        and not dropout
        and _varlen_parameters()
    ):
        out_THD = _varlen(
            query_1HTD[0].transpose(0, 1),
            key_1GTD.repeat_interleave(heads_per_group, dim=1)[0].transpose(0, 1),
            value_1GTD.repeat_interleave(heads_per_group, dim=1)[0].transpose(0, 1),
            cu_seq_lens_q,
            max_length_q,
            scaling,
            window,
        )
        return out_THD[None], None

    # `split` and not slices: its backward is one `cat`, a slice's is a row of zeros for every sample.
    lengths = cu_seq_lens_q.diff().tolist()
    if heads_per_group > 1:
        key_1GTD = key_1GTD.repeat_interleave(heads_per_group, dim=1)
        value_1GTD = value_1GTD.repeat_interleave(heads_per_group, dim=1)
    rows = (query_1HTD, key_1GTD, value_1GTD)
    outs = [
        _attend(query, key, value, scaling, dropout, window, softcap)
        for query, key, value in zip(*(row.split(lengths, dim=2) for row in rows), strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention over one sample, [1, H, length, D], with an optional sliding window and soft-capped scores."""
    if not window and not softcap:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    length = query.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    allowed = (distance >= 0) & (distance < (window or length))
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scaling)
    scores = query @ key.transpose(2, 3) * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~allowed, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


@cache
def _varlen_parameters() -> frozenset[str]:
    """The parameters of torch's varlen kernel: none where this torch has no such kernel (before 2.10)."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | None,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert max_seqlen is not None
    options: dict[str, Any] = {"scale": scaling} if "scale" in _varlen_parameters() else {}
    if "window_size" in _varlen_parameters():
        options["window_size"] = (window - 1 if window else -1, 0)
    elif window:
        raise UserError(
            "the model has a sliding window shorter than the longest sample, which this torch's attention kernel "
            "doesn't know: install torch>=2.12 or FlashAttention with model.attention=flash_attention_2"
        )
    else:
        options["is_causal"] = True
    if scaling is not None and "scale" not in options:
        query = query * (scaling * query.shape[-1] ** 0.5)
    out: Any = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out


# No mask function is registered under this name, so transformers builds no mask at all.
AttentionInterface.register(NAME, packed_attention)
