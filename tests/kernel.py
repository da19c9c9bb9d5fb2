"""A stand-in for CUDA's varlen kernel on the processor."""

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,  # torch 2.11 doesn't know of it
) -> Tensor:
    """The kernel's result by operations that a graph can hold."""
    position = torch.arange(query.shape[0], device=query.device)
    sample = torch.searchsorted(cu_seq_q, position, right=True, out_int32=True)
    allowed = (sample[:, None] == sample) & (position[:, None] >= position)
    rows = (row.transpose(0, 1) for row in (query, key, value))
    return F.scaled_dot_product_attention(*rows, attn_mask=allowed, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
