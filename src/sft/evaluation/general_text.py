"""A file of general text as samples, by whose loss one sees what training forgets: `evaluation.text`."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft.data.batch import SampleSet
from sft.data.conversation import text
from sft.data.dataset import DataConfig
from sft.data.labels import IGNORE
from sft.data.rows import Source
from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Pieces:
    """Samples cut into pieces of at most `max_length` tokens, each a sample of its own: its first token is given."""

    def __init__(self, samples: SampleSet, max_length: int) -> None:
        self._samples = samples
        num = -(-samples.lengths.astype(np.int64) // max_length)
        self._sample = np.repeat(np.arange(len(num)), num)
        first = np.repeat(np.cumsum(num) - num, num)
        self._begin = (np.arange(len(self._sample)) - first) * max_length
        lengths = np.minimum(samples.lengths[self._sample] - self._begin, max_length)
        kept = lengths > 1
        self._sample, self._begin = self._sample[kept], self._begin[kept]
        self.lengths: NDArray[np.int32] = lengths[kept].astype(np.int32)
        self.num_supervised = self.weight_sums = self.lengths - 1

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        begin, end = self._begin[i], self._begin[i] + self.lengths[i]
        ids, labels = (part[begin:end] for part in self._samples[int(self._sample[i])])
        return ids, np.concatenate([[np.int32(IGNORE)], labels[1:]])

    def weights(self, i: int) -> None:
        return None


def read(
    path: str, settings: DataConfig, tokenizer: "PreTrainedTokenizerFast", *, wait: bool, log: Callable[[str], None]
) -> Pieces:
    """The lines of a text file, or the column `text` of a file of rows, as `conf/data/text.yaml` reads them. UserError
    where there is nothing to read."""
    whole = replace(
        settings,
        conversation=partial(text, column="text"),
        supervise="all",
        overlong="drop",
        max_length=2**31 - 1,
        max_lost=1.0,
    )
    try:
        store = whole.store([Source(path)], tokenizer, wait=wait, log=log)
    except UserError as error:
        raise UserError(f"evaluation.text={path}: {error}") from error
    if num_lost := sum(counts["rows_lost"] for counts in store.counts):
        log(f"evaluation.text={path}: {num_lost:,} of its rows can't be read, and are left out")
    samples = Pieces(store, settings.max_length)
    if not len(samples):
        raise UserError(f"evaluation.text={path}: it holds no text of two tokens or more: name another file")
    return samples
