"""Attention for packs: each sample of a flat row attends to itself alone.

One name, `packed`, is registered with transformers. Which tokens of its own sample a token sees is what the model says
(`visible`); the tensors choose the kernel behind the name:

- CUDA in bf16 or fp16, also by autocast: FlashAttention inside torch (`varlen`);
- everything else: a call of scaled dot-product attention for each sample.

A run that sets `model.attention=flash_attention_2` (or 3) takes the user's own FlashAttention instead; it
reads the same `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k`.

Shape suffixes: T tokens of the row, H heads, G key/value heads, D head width (E where the values have another).
"""

from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from sft.model import varlen
from sft.model.noise import TOKENS, seeded
from sft.model.visible import NAME as NAME
from sft.model.visible import CannotPack, Visible

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a model is called with and may hand on to its attention. Any other tensor would change the scores.
PASSED_ON = frozenset({"cu_seq_lens_k", "position_ids", "seq_idx", "cu_seqlens", "logits_to_keep"})


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    attention_mask: Visible | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention within each sample of one flat row; returns [1, T, H, E] and no weights.

    Args:
        attention_mask: which tokens of its sample a token sees.
        s_aux: attention sinks [H], scores of no token.

    Raises:
        CannotPack: the model wants something else of its attention.
    """
    seen, name = attention_mask, type(module).__name__
    # Never guess: without boundaries samples would see each other; without `seen`, a token who knows what.
    if cu_seq_lens_q is None or max_length_q is None or not (1, query_1HTD.shape[2]) == key_1GTD.shape[::2]:
        raise CannotPack(f"{name} attends to other tokens than those of one flat row with boundaries")
    if not isinstance(seen, Visible) or False in (is_causal, getattr(module, "is_causal", True)):
        raise CannotPack(f"{name} has a mask of its own, or none")
    if seen.window == 0 or (sliding_window or seen.window) != seen.window:
        raise CannotPack(f"{name} has a sliding window of {sliding_window}, and one of {seen.window} by its mask")
    for what, value in others.items():
        if isinstance(value, Tensor) and what not in PASSED_ON:
            raise CannotPack(f"{name} hands {what} to its attention")
    rows = query_1HTD, key_1GTD, value_1GTE
    device_type = query_1HTD.device.type
    if torch.is_autocast_enabled(device_type):
        # Rotary embeddings leave queries and keys in fp32, and autocast knows nothing of this kernel.
        rows = tuple(row.to(torch.get_autocast_dtype(device_type)) for row in rows)  # type: ignore[assignment]
    window = seen.window if seen.window and seen.window < max_length_q else None
    chunk = seen.chunk if seen.chunk and seen.chunk < max_length_q else None
    scale = query_1HTD.shape[-1] ** -0.5 if scaling is None else scaling
    if not softcap and not dropout and varlen.takes(*rows, window):
        return varlen.attend(*rows, cu_seq_lens_q, max_length_q, scale, window, chunk, s_aux), None
    salt = getattr(module, "layer_idx", None) or 0
    return _by_sample(*rows, cu_seq_lens_q, scale, dropout, window, chunk, softcap, s_aux, salt), None


@torch.compiler.disable  # as many calls as there are samples, which no graph can know
def _by_sample(
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTE: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    chunk: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
    salt: int,
) -> Tensor:
    """A call for each sample, [1, T, H, E]. Dropout is drawn by sample, for the layer `salt`."""
    lengths, rows = _lengths(cu_seq_lens), varlen.ungrouped(query_1HTD, key_1GTD, value_1GTE)
    # `split` and not slices: its backward is one `cat`, a slice's is a row of zeros for every sample.
    samples = zip(*(row.split(lengths, dim=2) for row in rows), strict=True)
    seeds = TOKENS.seeds() if dropout else None
    outs = []
    for number, sample in enumerate(samples):
        with seeded(seeds[number], salt, query_1HTD.device) if seeds is not None else nullcontext():
            for query, key, value in (
                zip(*(row.split(chunk, dim=2) for row in sample), strict=True) if chunk else [sample]
            ):
                outs.append(_attend(query, key, value, scale, dropout, window, softcap, sink_H))
    return torch.cat([out.transpose(1, 2) for out in outs], dim=1)  # contiguous, as some models want it


@lru_cache(maxsize=1)
def _lengths(cu_seq_lens: Tensor) -> list[int]:
    """Tokens of each sample. The boundaries are the same tensor in every layer, so the device is asked once a batch."""
    lengths: list[int] = cu_seq_lens.diff().tolist()
    return lengths


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sink_H: Tensor | None,
) -> Tensor:
    """Causal attention over one sample or chunk, [1, H, length, E], with an optional sliding window, soft-capped scores
    and sinks."""
    given = softcap or sink_H is not None
    if not window and not given:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    length = query.shape[2]
    position = torch.arange(length, device=query.device)
    distance = position[:, None] - position
    allowed = (distance >= 0) & (distance < (window or length))
    if not given:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale)
    scores = query @ key.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sink_H is not None:
        scores = torch.cat([scores, sink_H.to(scores.dtype)[:, None, None].expand(1, -1, length, 1)], dim=-1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    if sink_H is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ value


def asked(setting: str) -> str | None:
    """What transformers is asked for by `model.attention`; None: its own choice for the model."""
    return {"auto": NAME, "own": None}.get(setting, setting)


def kernel(model: "PreTrainedModel", device: torch.device, arithmetic: torch.dtype) -> str:
    """What computes the attention of a model in training: the implementation that it was asked for or, for `packed`,
    what is behind it; two where layers differ."""
    config = model.config.get_text_config()
    asked = str(config._attn_implementation)
    if asked != NAME:
        return asked
    softcap = getattr(config, "attn_logit_softcapping", None)
    others = softcap or getattr(config, "attention_dropout", 0)
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    by_sample = "scores written out" if softcap or sinks else "scaled_dot_product_attention"
    widths = {getattr(module, "head_dim", None) for module in model.modules()}
    rows = [torch.empty(1, 1, 1, width, device=device, dtype=arithmetic) for width in widths if isinstance(width, int)]
    window = getattr(config, "sliding_window", None)
    taken = {not others and varlen.takes(row, row, row, window) for row in rows} or {False}
    ways = {True: "torch.nn.attention.varlen (FlashAttention)", False: f"{by_sample}, a call for each sample"}
    return "; ".join(way for takes, way in ways.items() if takes in taken)


AttentionInterface.register(NAME, packed_attention)
