"""The few samples of a certificate: short ones of the user's data, or made-up ones."""

import numpy as np

from sft.data.batch import SampleSet
from sft.data.labels import IGNORE
from sft.data.packing import pack
from sft.errors import UserError

NUM_SAMPLES = 146  # at most: two epochs make 20 steps of 16
SHORT_TOKENS = 128  # longer samples are taken only if there are too few of these
LAST_STEP_PACKS = (1, 2, 3)  # of an epoch: fewer than ranks, so that some ranks have nothing to do
WEIGHTS = (0.25, 3.0)  # the least and the largest that are drawn; of another mean than 1

Pair = tuple[np.ndarray, np.ndarray]  # input_ids and labels, int32 [tokens]


class Excerpt:
    """Samples in memory, as `SFTDataModule` reads them, and the length of a pack."""

    def __init__(self, pairs: list[Pair], max_length: int, weights: list[np.ndarray] | None = None) -> None:
        self.pairs, self.max_length, self._weights = pairs, max_length, weights
        self.lengths = np.array([len(ids) for ids, _ in pairs], dtype=np.int32)
        self.num_supervised = np.array([(labels != IGNORE).sum() for _, labels in pairs], dtype=np.int32)
        self.weight_sums = self.num_supervised
        if weights is not None:
            self.weight_sums = np.array([of_sample.sum(dtype=np.float64) for of_sample in weights])

    def __reduce__(self) -> tuple[type["Excerpt"], tuple[object, ...]]:
        return Excerpt, (self.pairs, self.max_length, self._weights)  # counted again in the process that it is sent to

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]

    def weights(self, index: int) -> np.ndarray | None:
        return None if self._weights is None else self._weights[index]

    def weighted_sample(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Input_ids, labels and weights, each [tokens]."""
        ids, labels = self.pairs[index]
        weights = self.weights(index)
        return ids, labels, np.ones(len(ids), dtype=np.float32) if weights is None else weights

    def reweighted(self, seed: int) -> "Excerpt":
        """The same samples, with a weight drawn from the seed for every supervised token."""
        rng = np.random.default_rng(seed)
        weights = [
            np.where(labels == IGNORE, 0, rng.uniform(*WEIGHTS, len(labels))).astype(np.float32)
            for _, labels in self.pairs
        ]
        return Excerpt(self.pairs, self.max_length, weights)

    @property
    def vocab_size(self) -> int:
        """An odd number greater than any id."""
        return max(int(ids.max()) for ids, _ in self.pairs) + 1 | 1


def excerpt(samples: SampleSet, lengths: np.ndarray, global_batch_size: int) -> Excerpt:
    """The first short samples, or else the shortest, with their ids renumbered from 0 without gaps.

    So the vocabulary is only as large as it must be. Which number a token has changes no result.
    """
    short = np.flatnonzero(lengths <= SHORT_TOKENS)[:NUM_SAMPLES]
    if len(short) <= global_batch_size:
        short = np.sort(np.argsort(lengths, kind="stable")[:NUM_SAMPLES])
    pairs = [samples[int(index)] for index in short]
    weights = [weights for index in short if (weights := samples.weights(int(index))) is not None]
    vocabulary = np.unique(np.concatenate([ids for ids, _ in pairs]))
    renumbered = []
    for ids, labels in pairs:
        new_labels = np.where(labels == IGNORE, IGNORE, np.searchsorted(vocabulary, labels))
        renumbered.append((np.searchsorted(vocabulary, ids).astype(np.int32), new_labels.astype(np.int32)))
    return _with_small_last_step(renumbered, global_batch_size, weights or None)


def made_up(seed: int, global_batch_size: int) -> Excerpt:
    """Samples of 6 to 45 tokens drawn from the seed, the end of each supervised."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(NUM_SAMPLES):
        ids = (96 * rng.random(rng.integers(6, 46)) ** 2).astype(np.int32)  # some far more often than others
        labels = ids.copy()
        labels[: rng.integers(1, len(ids) - 1)] = IGNORE
        pairs.append((ids, labels))
    return _with_small_last_step(pairs, global_batch_size)


def _with_small_last_step(
    pairs: list[Pair], global_batch_size: int, weights: list[np.ndarray] | None = None
) -> Excerpt:
    """Leaves out a few samples and chooses the length of a pack so that an epoch's last step is a small one, packed or
    not: that is where divisors go wrong."""
    lengths = np.array([len(ids) for ids, _ in pairs])
    longest = int(lengths.max())
    for num_samples in range(len(pairs), global_batch_size, -1):
        if num_samples % global_batch_size not in LAST_STEP_PACKS:
            continue
        for max_length in sorted(range(longest, 4 * longest), key=lambda length: abs(length - 2 * longest)):
            num_packs = len(pack(lengths[:num_samples], max_length)[1]) - 1
            if num_packs > global_batch_size and num_packs % global_batch_size in LAST_STEP_PACKS:
                return Excerpt(pairs[:num_samples], max_length, weights[:num_samples] if weights else None)
    raise UserError(
        f"{len(pairs)} samples are too few to certify with: name data of {3 * global_batch_size} or more, "
        "or none for made-up ones"
    )
