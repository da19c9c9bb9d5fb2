"""Attention for packs: each sample of a flat row attends to itself alone.

One name, `packed`, is registered with transformers; the tensors choose the kernel behind it:

- CUDA in bf16 or fp16, also by autocast: `torch.nn.attention.varlen.varlen_attn` (FlashAttention inside torch, from
  2.10 on; no extra wheel);
- everything else: a call of scaled dot-product attention for each sample.

A run that sets `model.attention=flash_attention_2` (or 3) takes the user's own FlashAttention instead; it
reads the same `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`.

Shape suffixes: T tokens of the row, H heads, G key/value heads, D head width (E where the values have another).
"""

import inspect
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft.errors import UserError
from sft.model.noise import TOKENS, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None

NAME = "packed"
# What the kernel can be told, which differs: 2.10 has `is_causal`, 2.11 `window_size` and `scale`, 2.12 `enable_gqa`.
KERNEL_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn else frozenset()
WIDEST_HEAD = 256  # of the kernel


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention within each sample of one flat row; returns [1, T, H, E] and no weights."""
    if s_aux is not None:
        raise UserError(
            f"{type(module).__name__} has attention sinks, which attention=packed doesn't compute: "
            "set model.attention=flash_attention_3 and install FlashAttention"
        )
    # A mask, or a missing boundary, would mean that the samples are not told apart: never guess here.
    assert attention_mask is None and cu_seq_lens_q is not None and query_1HTD.shape[0] == 1
    rows = query_1HTD, key_1GTD, value_1GTE
    device_type = query_1HTD.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings leave queries and keys in fp32, and autocast knows nothing of this kernel.
        rows = tuple(row.to(torch.get_autocast_dtype(device_type)) for row in rows)  # type: ignore[assignment]
    window = sliding_window if sliding_window and max_length_q and sliding_window < max_length_q else None
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if max_length_q and not softcap and not dropout and _kernel_takes(*rows, window):
        return _varlen(*rows, cu_seq_lens_q, max_length_q, scale, window), None
    salt = getattr(module, "layer_idx", None) or 0
    return _by_sample(*rows, cu_seq_lens_q, scale, dropout, window, softcap, salt), None


@torch.compiler.disable  # as many calls as there are samples, which no graph can know
def _by_sample(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    salt: int,
) -> Tensor:
    """A call for each sample, [1, T, H, E]. Dropout is drawn by sample, for the layer `salt`."""
    lengths, rows = _lengths(cu_seq_lens), _ungrouped(query_1HTD, key_1GTD, value_1GTE)
    # `split` and not slices: its backward is one `cat`, a slice's is a row of zeros for every sample.
    samples = zip(*(row.split(lengths, dim=2) for row in rows), strict=True)
    seeds = TOKENS.seeds() if dropout else None
    outs = []
    for number, (query, key, value) in enumerate(samples):
        with seeded(seeds[number], salt, query.device) if seeds is not None else nullcontext():
            outs.append(_attend(query, key, value, scale, dropout, window, softcap))
    return torch.cat(outs, dim=2).transpose(1, 2)


def _ungrouped(query_1HTD: Tensor, key_1GTD: Tensor, value_1GTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """With as many heads of keys and values as of queries."""
    num = query_1HTD.shape[1] // key_1GTD.shape[1]
    if num == 1:
        return query_1HTD, key_1GTD, value_1GTE
    return query_1HTD, key_1GTD.repeat_interleave(num, dim=1), value_1GTE.repeat_interleave(num, dim=1)


@lru_cache(maxsize=1)
def _lengths(cu_seq_lens: Tensor) -> list[int]:
    """Tokens of each sample. The boundaries are the same tensor in every layer, so the device is asked once a batch."""
    lengths: list[int] = cu_seq_lens.diff().tolist()
    return lengths


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention over one sample, [1, H, length, E], with an optional sliding window and soft-capped scores."""
    if not window and not softcap:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    length = query.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    allowed = (distance >= 0) & (distance < (window or length))
    if not softcap:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale)
    scores = query @ key.transpose(2, 3) * scale
    scores = (softcap * torch.tanh(scores / softcap)).masked_fill(~allowed, float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), dropout)
    return weights @ value


def _kernel_takes(query: Tensor, key: Tensor, value: Tensor, window: int | None) -> bool:
    """Whether torch's varlen kernel can do it."""
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
        and (window is None or "window_size" in KERNEL_OPTIONS)
        and _has_flash_attention(query.device)
    )


def asked(setting: str) -> str | None:
    """What transformers is asked for by `model.attention`; None: its own choice for the model."""
    return {"auto": NAME, "own": None}.get(setting, setting)


def kernel(model: "PreTrainedModel", device: torch.device, arithmetic: torch.dtype) -> str:
    """What computes the attention of a model in training: the implementation that it was asked for or, of `packed`, the
    kernel behind it."""
    config = model.config.get_text_config()
    asked = str(config._attn_implementation)
    if asked != NAME:
        return asked
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = torch.empty(1, 1, 1, width, device=device, dtype=arithmetic)
    others = getattr(config, "attn_logit_softcapping", None) or getattr(config, "attention_dropout", 0)
    if not others and _kernel_takes(row, row, row, getattr(config, "sliding_window", None)):
        return "torch.nn.attention.varlen (FlashAttention)"
    return "scaled_dot_product_attention, a call for each sample"


@torch.compiler.assume_constant_result  # no part of a graph
def _has_flash_attention(device: torch.device) -> bool:
    """Compiled into torch for Ampere (compute capability 8.0) and later."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _varlen(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """The same by one call of torch's varlen kernel, [1, T, H, E]."""
    out_width = value_1GTE.shape[-1]
    width = _kernel_width(max(query_1HTD.shape[-1], out_width))
    options: dict[str, Any] = {}
    if "enable_gqa" in KERNEL_OPTIONS:
        options["enable_gqa"] = query_1HTD.shape[1] != key_1GTD.shape[1]
        rows = query_1HTD, key_1GTD, value_1GTE
    else:
        rows = _ungrouped(query_1HTD, key_1GTD, value_1GTE)
    # [T, H, D]; zeros at the end of a head change no score, and what they make of the values is cut off below.
    query, key, value = (_widened(row[0].transpose(0, 1), width) for row in rows)
    if "scale" in KERNEL_OPTIONS:
        options["scale"] = scale
    elif scale != width**-0.5:
        query = query * (scale * width**0.5)
    if "window_size" in KERNEL_OPTIONS:
        options["window_size"] = (window - 1 if window else -1, 0)
    else:
        options["is_causal"] = True
    out: Tensor = varlen_attn(query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, **options)
    return (out if out_width == width else out[..., :out_width])[None]


def _kernel_width(width: int) -> int:
    """The narrowest head of at least this width that every card has a backward pass for: of multiples of 8, and not of
    200 to 224, which compute capabilities 8.6, 8.9 and 12 lack."""
    return WIDEST_HEAD if width > 192 else -(-width // 8) * 8


def _widened(rows_THD: Tensor, width: int) -> Tensor:
    missing = width - rows_THD.shape[-1]
    return F.pad(rows_THD, (0, missing)) if missing else rows_THD


# No mask function is registered under this name, so transformers builds no mask at all.
AttentionInterface.register(NAME, packed_attention)
