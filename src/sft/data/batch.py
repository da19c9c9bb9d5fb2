"""Samples → batch: the tensors of one micro-batch, flat, without padding."""

from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from sft.data.tokenization import IGNORE


class Batch(TypedDict):
    """One micro-batch of a rank: its samples end to end. T is the number of tokens."""

    input_ids: Tensor  # int64 [1, T]
    labels: Tensor  # int64 [1, T], aligned with input_ids; IGNORE where there is no loss
    position_ids: Tensor  # int64 [1, T], from 0 in every sample: what keeps samples apart
    cu_seqlens: Tensor  # int32 [num_samples + 1]: sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen: int  # tokens of the longest sample
    num_supervised: int  # supervised tokens of the whole global step, all ranks and micro-batches
    num_tokens: int  # tokens of this micro-batch; 0 where it is empty


class Samples(Protocol):
    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]: ...


def make_batch(samples: Samples, indices: np.ndarray, step_num_supervised: int) -> Batch:
    """Lay `samples[indices]` end to end; each is a pair (input_ids, labels) of equal length.

    No indices give one token without loss: the rank still runs forward and backward, as the collectives of
    the others require, and adds 0 to the step.
    """
    pairs = [samples[int(i)] for i in indices]
    num_tokens = sum(len(ids) for ids, _ in pairs)
    if not pairs:
        pairs = [(np.zeros(1, dtype=np.int32), np.full(1, IGNORE, dtype=np.int32))]
    lengths = [len(ids) for ids, _ in pairs]
    return {
        "input_ids": _row([ids for ids, _ in pairs]),
        "labels": _row([labels for _, labels in pairs]),
        "position_ids": _row([np.arange(length) for length in lengths]),
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_seqlen": max(lengths),
        "num_supervised": step_num_supervised,
        "num_tokens": num_tokens,
    }


def _row(parts: list[np.ndarray]) -> Tensor:
    """int64 [1, T]"""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
