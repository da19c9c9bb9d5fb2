"""The model before training, as each validation compares with it: `base.safetensors` in the run's folder.

log_probs   float32 [M, V]         log-probabilities over the vocabulary at M fixed tokens; 78 MB of 128 · 152,000
fixed       int64 [2, M]           sample and position of each
nll         float64 [num_samples]  Σ w · (−log p) of each validation sample
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sft.checkpoint import safetensors_file
from sft.runs.files import unfinished

NAME = "base.safetensors"


@dataclass(frozen=True)
class FixedTokens:
    """Tokens at which two models are compared, each by its sample and the position before it."""

    sample: NDArray[np.int64]  # [M]
    position: NDArray[np.int64]  # [M], in the sample

    @classmethod
    def spread(cls, lengths: NDArray[np.int32], num: int) -> "FixedTokens":
        """`num` tokens, or all if there are fewer, at equal distances over the samples of these lengths, prompts and
        responses alike; never a sample's first token, which nothing predicts."""
        counts = lengths.astype(np.int64) - 1
        ends = np.cumsum(counts)
        total = int(ends[-1])
        num = min(num, total)
        places = (2 * np.arange(num) + 1) * total // (2 * max(num, 1))
        sample = np.searchsorted(ends, places, side="right")
        return cls(sample, places - ends[sample] + counts[sample])

    def of_batch(
        self, samples: NDArray[np.int64], lengths: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Those of a batch of these samples, end to end: their numbers and their ascending positions in the batch, both
        [M]. `lengths` [num_samples]: of all samples."""
        starts = dict(zip(samples.tolist(), np.cumsum([0, *lengths[samples]]).tolist(), strict=False))
        numbers = np.flatnonzero(np.isin(self.sample, samples))
        positions = [starts[sample] for sample in self.sample[numbers].tolist()] + self.position[numbers]
        order = np.argsort(positions)  # a batch has its samples in any order
        return numbers[order], positions[order].astype(np.int64)


class Base:
    """The file, read in ranges: nothing of it is held but the losses of the samples."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self.nll: NDArray[np.float64] = self._file.get_tensor("nll").numpy()
        self.fixed = None
        if "fixed" in set(self._file.keys()):
            self.fixed = FixedTokens(*self._file.get_tensor("fixed").numpy())

    @classmethod
    def read(cls, folder: Path, num_samples: int) -> "Base | None":
        """None where there is no file that can be read, of as many samples."""
        try:
            base = cls(folder / NAME)
        except (OSError, SafetensorError):
            return None
        return base if len(base.nll) == num_samples else None

    def log_probs(self, number: int) -> Tensor:
        """At a fixed token, [V]."""
        return self._file.get_slice("log_probs")[number : number + 1][0]


def write(
    folder: Path, nll: NDArray[np.float64], fixed: FixedTokens | None, log_probs: NDArray[np.float32] | None
) -> None:
    tensors = {"nll": torch.from_numpy(nll)}
    if fixed is not None and log_probs is not None:
        both = np.stack([fixed.sample, fixed.position])
        tensors |= {"fixed": torch.from_numpy(both), "log_probs": torch.from_numpy(log_probs)}
    folder.mkdir(parents=True, exist_ok=True)
    layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    safetensors_file.write(unfinished(folder / NAME), layout, tensors.__getitem__)
    os.replace(unfinished(folder / NAME), folder / NAME)


def gain(
    before: NDArray[np.float64], now: NDArray[np.float64], weight: NDArray[np.float64]
) -> tuple[float, float | None]:
    """How much lower the loss is than before training, and its standard error; None of less than two samples.

    Of each of n samples: Σ w · (−log p) before and now, and Σ w. With d_i their difference and w_i the weight, the gain
    is the ratio R = Σ d_i / Σ w_i, and as both change with the samples its error is that of the linearised ratio,

        se(R) = √( n/(n − 1) · Σ (d_i − R w_i)² ) / Σ w_i

    (Cochran, Sampling Techniques, 3rd edition 1977, ch. 6: the ratio estimate and its variance from a sample, here of
    a population without end).

    The samples are paired with themselves, so that what makes some of them hard doesn't add to it.
    """
    difference, num = before - now, len(weight)
    ratio = float(difference.sum() / weight.sum())
    squares = float(((difference - ratio * weight) ** 2).sum())
    return ratio, math.sqrt(num / (num - 1) * squares) / float(weight.sum()) if num > 1 else None
