"""The few samples that a certificate is made with: short ones of the user's data, or made-up ones."""

from pathlib import Path

import numpy as np

from sft.data.batch import Samples
from sft.data.mask import IGNORE
from sft.data.packing import pack
from sft.data.step_plan import EpochPlan, epoch_plan, position
from sft.errors import UserError

MOST = 146  # two epochs make 20 steps of 16
SHORT = 128  # tokens; longer ones are taken only where there are too few of these
LEFT_OVER = (1, 2, 3)  # packs of an epoch's last step: fewer than ranks, so that some have nothing to do


class Excerpt:
    """Samples in memory, as `SFTDataModule` reads them, and the length of their packs."""

    def __init__(self, pairs: list[tuple[np.ndarray, np.ndarray]], max_length: int) -> None:
        self.pairs, self.max_length = pairs, max_length
        self.lengths = np.array([len(ids) for ids, _ in pairs], dtype=np.int32)
        self.num_supervised = np.array([(labels != IGNORE).sum() for _, labels in pairs], dtype=np.int32)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.pairs[index]

    @property
    def vocab_size(self) -> int:
        """Odd, and more than any id."""
        return max(int(ids.max()) for ids, _ in self.pairs) + 1 | 1

    def steps(self, num_steps: int, global_batch_size: int, packed: bool, seed: int) -> list[list[int]]:
        """The samples of each step, from the step plan."""

        def plan(epoch: int) -> EpochPlan:
            return epoch_plan(
                self.lengths,
                self.num_supervised,
                seed=seed,
                epoch=epoch,
                global_batch_size=global_batch_size,
                max_length=self.max_length,
                packing=packed,
            )

        places = [position(step, plan(0).num_steps) for step in range(num_steps)]
        return [np.concatenate(plan(epoch).step(step).packs).tolist() for epoch, step in places]

    def save(self, path: Path) -> None:
        np.savez(
            path,
            ids=np.concatenate([ids for ids, _ in self.pairs]),
            labels=np.concatenate([labels for _, labels in self.pairs]),
            ends=np.cumsum(self.lengths),
            max_length=self.max_length,
        )

    @classmethod
    def load(cls, path: Path) -> "Excerpt":
        with np.load(path) as file:
            parts = [np.split(file[name], file["ends"][:-1]) for name in ("ids", "labels")]
            return cls(list(zip(*parts, strict=True)), int(file["max_length"]))


def excerpt(samples: Samples, lengths: np.ndarray, global_batch_size: int) -> Excerpt:
    """The first short samples, or else the shortest, their ids numbered anew from 0 without gaps.

    A vocabulary of what occurs alone costs nothing, and which number a token has changes nothing.
    """
    short = np.flatnonzero(lengths <= SHORT)[:MOST]
    if len(short) <= global_batch_size:
        short = np.sort(np.argsort(lengths, kind="stable")[:MOST])
    pairs = [samples[int(index)] for index in short]
    known = np.unique(np.concatenate([ids for ids, _ in pairs]))
    anew = [
        (np.searchsorted(known, ids), np.where(labels == IGNORE, IGNORE, np.searchsorted(known, labels)))
        for ids, labels in pairs
    ]
    return _cut([(ids.astype(np.int32), labels.astype(np.int32)) for ids, labels in anew], global_batch_size)


def made_up(seed: int, global_batch_size: int) -> Excerpt:
    """Samples of 6 to 45 tokens drawn from the seed, the end of each supervised."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(MOST):
        ids = (96 * rng.random(rng.integers(6, 46)) ** 2).astype(np.int32)  # some far more often than others
        labels = ids.copy()
        labels[: rng.integers(1, len(ids) - 1)] = IGNORE
        pairs.append((ids, labels))
    return _cut(pairs, global_batch_size)


def _cut(pairs: list[tuple[np.ndarray, np.ndarray]], global_batch_size: int) -> Excerpt:
    """Leaves a few samples out, and sets the length of a pack, so that the last step of an epoch is a small one, packed
    and not: that is where divisors go wrong."""
    lengths = np.array([len(ids) for ids, _ in pairs])
    longest = int(lengths.max())
    for count in range(len(pairs), global_batch_size, -1):
        if count % global_batch_size not in LEFT_OVER:
            continue
        for max_length in sorted(range(longest, 4 * longest), key=lambda length: abs(length - 2 * longest)):
            num_packs = len(pack(lengths[:count], max_length)[1]) - 1
            if num_packs > global_batch_size and num_packs % global_batch_size in LEFT_OVER:
                return Excerpt(pairs[:count], max_length)
    raise UserError(
        f"{len(pairs)} samples are too few to certify with: name data of {3 * global_batch_size} or more, "
        "or none for made-up ones"
    )
