"""Samples → batch: the tensors of one micro-batch, flat, without padding."""

from collections.abc import Sequence
from typing import NotRequired, Protocol, TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.data.labels import IGNORE


class Batch(TypedDict):
    """One micro-batch of a rank: its samples end to end. T is its number of tokens, N of supervised tokens."""

    input_ids: Tensor  # int64 [1, T]
    labels: Tensor  # int64 [1, T], aligned with input_ids; IGNORE where there is no loss
    position_ids: Tensor  # int64 [1, T], from 0 in every sample, which keeps samples apart
    predicting: Tensor  # int64 [N]: positions whose next token is supervised, found here without a device
    weights: Tensor | None  # float32 [N]: of each supervised token's loss; None: all 1
    cu_seqlens: Tensor  # int32 [num_samples + 1]: sample s is tokens cu_seqlens[s] to cu_seqlens[s + 1]
    max_seqlen: int  # tokens of the longest sample
    step_weight: float  # sum of weights of the whole global step, all ranks and micro-batches: its loss's divisor
    num_tokens: int  # tokens of this micro-batch; 0 if it is empty
    counts: NDArray[np.int64]  # [num_samples, 3], known without a device: tokens, `predicting` and `fixed` of a sample
    keys: NotRequired[Tensor]  # int32 [T], which random numbers of each token are drawn from
    seeds: NotRequired[list[int]]  # [num_samples]: the first key of each sample, known without a device
    num_parts: NotRequired[int]  # forward passes of every rank for this micro-batch, where samples run apart
    samples: NotRequired[NDArray[np.int64]]  # [num_samples], in validation: their numbers in its set
    fixed: NotRequired[Tensor]  # int64 [M], in validation: positions whose next token the base model is compared at


class SampleSet(Protocol):
    """Samples by number, each (input_ids, labels), both [tokens], with their lengths."""

    def __getitem__(self, index: int, /) -> tuple[NDArray[np.int32], NDArray[np.int32]]: ...

    def weights(self, index: int, /) -> NDArray[np.float32] | None:
        """Of each token's loss, [tokens], 0 where there is none. None, for all samples: supervised tokens weigh 1."""

    @property
    def lengths(self) -> NDArray[np.int32]: ...  # [num_samples], tokens

    @property
    def num_supervised(self) -> NDArray[np.int32]: ...  # [num_samples], tokens with loss

    @property
    def weight_sums(self) -> NDArray[np.float64] | NDArray[np.int32]: ...  # [num_samples], of tokens with loss

    def __len__(self) -> int: ...


def make_batch(
    samples: SampleSet, indices: NDArray[np.int64], step_weight: float, draw: tuple[int, int] | None = None
) -> Batch:
    """Lays `samples[indices]` end to end. With `draw`, a seed and the number of the step, tokens have keys.

    No indices give one token without loss: the rank still runs forward and backward, as the collectives of the others
    require, and adds 0 to the step.
    """
    pairs = [samples[int(i)] for i in indices]
    num_tokens = sum(len(ids) for ids, _ in pairs)
    if not pairs:
        pairs = [(np.zeros(1, dtype=np.int32), np.full(1, IGNORE, dtype=np.int32))]
    lengths = [len(ids) for ids, _ in pairs]
    labels = np.concatenate([labels for _, labels in pairs]).astype(np.int64)
    # The first token of a sample is never supervised, so the shift by one never crosses two samples of a row.
    predicting = np.flatnonzero(labels[1:] != IGNORE)
    weights = [weights for i in indices if (weights := samples.weights(int(i))) is not None]
    assert len(weights) in (0, len(indices)), "weights of some samples and not of others"
    batch: Batch = {
        "input_ids": _row([ids for ids, _ in pairs]),
        "labels": torch.from_numpy(labels)[None],
        "position_ids": _row([np.arange(length) for length in lengths]),
        "predicting": torch.from_numpy(predicting),
        "weights": torch.from_numpy(np.concatenate(weights)[predicting + 1]) if weights else None,
        "cu_seqlens": torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)),
        "max_seqlen": max(lengths),
        "step_weight": step_weight,
        "num_tokens": num_tokens,
        "counts": np.array([[len(labels), np.count_nonzero(labels != IGNORE), 0] for _, labels in pairs]),
    }
    if draw is not None:
        numbers = [-1] if len(indices) == 0 else indices.tolist()
        keys = [token_keys(*draw, number, length) for number, length in zip(numbers, lengths, strict=True)]
        batch["keys"], batch["seeds"] = torch.from_numpy(np.concatenate(keys)), [int(key[0]) for key in keys]
    return batch


def token_keys(seed: int, step: int, sample: int, length: int) -> NDArray[np.int32]:
    """A random number for each token of a sample in a step, [length]: the same whatever is beside it."""
    numbers = np.random.default_rng([seed, step, sample + 1]).integers(2**32, size=length, dtype=np.uint32)
    return numbers.view(np.int32)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on a device. The host doesn't wait for CUDA, for which tensors are pinned first.

    It waits for MPS, which may read a tensor after it was freed (github.com/pytorch/pytorch/issues/83015).
    """
    pinned, waits = device.type == "cuda", device.type in ("cpu", "mps")

    def move(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return (value.pin_memory() if pinned else value).to(device, non_blocking=not waits)

    return cast(Batch, {name: move(value) for name, value in batch.items()})


def _row(parts: Sequence[NDArray[np.int32] | NDArray[np.int64]]) -> Tensor:
    """int64 [1, T]"""
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]
