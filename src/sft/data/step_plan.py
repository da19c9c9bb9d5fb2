"""Packs → step plan: which samples form global step k, and which of them each rank sees.

    all samples → permute(seed, epoch) → pack → permute packs → steps of `global_batch_size` packs
                                                                  └→ share(step): rank → its micro-batches

All of it is a function of (lengths, seed, epoch, global batch size). Ranks and accumulation only share a step out. So
a run resumes at its exact next sample on any number of GPUs, and what the loss of a step is divided by, the number
of its supervised tokens or the sum of their weights, is known before its first forward pass.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from sft.data.packing import pack
from sft.errors import UserError

DEFAULT_PACKS = 16  # of a step
LEAST_STEPS = 16  # of an epoch, where the size of a step is left open


@dataclass(frozen=True)
class Step:
    """The samples of one optimizer step, over all ranks."""

    packs: list[NDArray[np.int64]]  # each [num_samples in the pack]: indices of samples
    num_supervised: int
    weight: float  # the sum of the weights of the supervised tokens; their number where all weigh 1
    num_tokens: int


@dataclass(frozen=True)
class EpochPlan:
    """Every sample once, in steps of `global_batch_size` packs; the last step may have fewer, and none is dropped."""

    packs: list[NDArray[np.int64]]  # in the order of training
    lengths: NDArray[np.int32]  # [num_samples], tokens
    num_supervised: NDArray[np.int32]  # [num_samples], tokens
    weight_sums: NDArray[np.float64] | NDArray[np.int32]  # [num_samples], of the supervised tokens of each
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        return -(-len(self.packs) // self.global_batch_size)

    def step(self, k: int) -> Step:
        assert 0 <= k < self.num_steps, f"step {k} of an epoch of {self.num_steps}"
        packs = self.packs[k * self.global_batch_size : (k + 1) * self.global_batch_size]
        samples = np.concatenate(packs)
        return Step(
            packs=packs,
            num_supervised=int(self.num_supervised[samples].sum(dtype=np.int64)),
            weight=float(self.weight_sums[samples].sum(dtype=np.float64)),
            num_tokens=int(self.lengths[samples].sum(dtype=np.int64)),
        )

    @cached_property
    def seen(self) -> NDArray[np.int64]:
        """[num_steps + 1, 2]: tokens of the epoch, and supervised ones, before each step and after the last."""
        ends = np.cumsum([0, *map(len, self.packs)])[[*range(0, len(self.packs), self.global_batch_size), -1]]
        counts = np.stack([self.lengths, self.num_supervised], axis=1)[np.concatenate(self.packs)]
        return np.concatenate([[[0, 0]], counts.cumsum(axis=0, dtype=np.int64)])[ends]


def epoch_plan(
    lengths: NDArray[np.int32],
    num_supervised: NDArray[np.int32],
    weight_sums: NDArray[np.float64] | NDArray[np.int32] | None = None,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    max_length: int,
    packing: bool,
) -> EpochPlan:
    """The plan of one epoch. Without packing each sample is a pack of its own; without the sums of the samples' weights
    every supervised token weighs 1."""
    rng = np.random.default_rng([seed, epoch])
    # Permuted before packing too, so that samples of equal length share a pack with others every epoch.
    packs = _packs(lengths, rng.permutation(len(lengths)), max_length, packing)
    packs = [packs[i] for i in rng.permutation(len(packs))]
    sums = num_supervised if weight_sums is None else weight_sums
    return EpochPlan(packs, lengths, num_supervised, sums, global_batch_size)


def _packs(
    lengths: NDArray[np.int32], samples: NDArray[np.int64], max_length: int, packing: bool
) -> list[NDArray[np.int64]]:
    if not packing:
        return list(samples.reshape(-1, 1))
    order, starts = pack(lengths[samples], max_length)
    return np.split(samples[order], starts[1:-1])


def share(
    step: Step, lengths: NDArray[np.int32], *, world_size: int, micro_batch_size: int, accumulation: int, rank: int
) -> list[NDArray[np.int64]]:
    """One rank's micro-batches of a step: `accumulation` arrays of sample indices, each of at most `micro_batch_size`
    packs. Over all ranks they hold each pack of the step once.

    Packs of equal length differ in attention cost (the sum of squared sample lengths), so they are dealt in snake
    order, the costliest first: then no rank waits for another. In an epoch's smaller last step micro-batches may be
    empty, but each rank has as many as in any step.
    """
    assert len(step.packs) <= world_size * micro_batch_size * accumulation, "a step larger than the global batch"
    order, _, rank_P = _dealt(step, lengths, world_size)
    mine = order[rank_P == rank].tolist()
    return [
        _joined([step.packs[i] for i in mine[a * micro_batch_size : (a + 1) * micro_batch_size]])
        for a in range(accumulation)
    ]


def most_samples(
    step: Step, lengths: NDArray[np.int32], *, world_size: int, micro_batch_size: int, accumulation: int
) -> list[int]:
    """Of each of the `accumulation` micro-batches, the number of samples of the rank that has most of them; an empty
    one counts as one."""
    order, turn_P, rank_P = _dealt(step, lengths, world_size)
    num_samples = np.zeros((accumulation, world_size), dtype=np.int64)
    np.add.at(num_samples, (turn_P // micro_batch_size, rank_P), np.array([len(step.packs[i]) for i in order]))
    most: list[int] = num_samples.max(axis=1).clip(1).tolist()
    return most


def _dealt(
    step: Step, lengths: NDArray[np.int32], world_size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The packs of a step, the costliest first, and of each of them its place among those of its rank, and the rank:
    0, 1, ..., w-1, w-1, ..., 1, 0, 0, 1, ..."""
    starts = np.cumsum([0, *map(len, step.packs[:-1])])
    cost = np.add.reduceat(lengths[np.concatenate(step.packs)].astype(np.int64) ** 2, starts)
    turn, rank = np.divmod(np.arange(len(step.packs)), world_size)
    return np.argsort(-cost, kind="stable"), turn, np.where(turn % 2 == 0, rank, world_size - 1 - rank)


def _joined(packs: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(packs) if packs else np.empty(0, dtype=np.int64)


def eval_plan(
    lengths: NDArray[np.int32], *, max_length: int, packing: bool, micro_batch_size: int, world_size: int, rank: int
) -> list[NDArray[np.int64]]:
    """One rank's micro-batches of a pass over all samples, in order: arrays of sample indices.

    They are dealt to the ranks in turn; every rank has the same number, and the last of some ranks may be empty.
    """
    return _eval_batches(lengths, max_length, packing, micro_batch_size, world_size)[rank::world_size]


def most_eval_samples(
    lengths: NDArray[np.int32], *, max_length: int, packing: bool, micro_batch_size: int, world_size: int
) -> list[int]:
    """Of each of the micro-batches of an `eval_plan`, as `most_samples`."""
    sizes = [len(batch) for batch in _eval_batches(lengths, max_length, packing, micro_batch_size, world_size)]
    return [max(1, *sizes[start : start + world_size]) for start in range(0, len(sizes), world_size)]


def _eval_batches(
    lengths: NDArray[np.int32], max_length: int, packing: bool, micro_batch_size: int, world_size: int
) -> list[NDArray[np.int64]]:
    """Those of all ranks, in turn."""
    packs = _packs(lengths, np.arange(len(lengths)), max_length, packing)
    batches = [_joined(packs[i : i + micro_batch_size]) for i in range(0, len(packs), micro_batch_size)]
    return batches + [_joined([])] * (-len(batches) % world_size)


def default_step(lengths: NDArray[np.int32], max_length: int, packing: bool) -> tuple[int, int]:
    """Packs of a step, and the most tokens of a pack, where the global batch is left open: 16 packs of `max_length`, or
    so much less that an epoch has 16 steps. Otherwise all samples of a small file would make one step."""
    num_packs = len(_packs(lengths, np.arange(len(lengths)), max_length, packing))
    if num_packs < LEAST_STEPS and packing:
        # No sample is cut, so that a pack has room for the longest.
        return 1, min(max_length, max(int(lengths.max()), math.ceil(int(lengths.sum()) / LEAST_STEPS)))
    return min(DEFAULT_PACKS, max(1, num_packs // LEAST_STEPS)), max_length


def num_steps(epochs: float, max_steps: int | None, steps_per_epoch: int) -> int:
    """Optimizer steps of a run: `max_steps`, over as many epochs as it takes, or those of whole and broken epochs."""
    return max_steps or max(1, math.ceil(epochs * steps_per_epoch - 1e-9))  # 0.1 of 30 is more than 3 in binary


def check_division(global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """The number of micro-batches that each rank accumulates in a step. UserError unless the division is exact."""
    packs_at_once = world_size * micro_batch_size
    accumulation, rest = divmod(global_batch_size, packs_at_once)
    if rest == 0 and accumulation > 0:
        return accumulation
    sizes = sorted({max(accumulation, 1) * packs_at_once, (accumulation + 1) * packs_at_once})
    advice = f"use a global batch size of {' or '.join(map(str, sizes))}"
    per_rank, rest = divmod(global_batch_size, world_size)
    if rest == 0 and per_rank > 0:
        divisors = [m for m in range(1, per_rank + 1) if per_rank % m == 0]
        nearest = sorted(sorted(divisors, key=lambda m: abs(m - micro_batch_size))[:2])
        advice += f", or a micro-batch size of {' or '.join(map(str, nearest))}"
    raise UserError(
        f"a global batch of {global_batch_size} packs does not divide among {world_size} ranks in "
        f"micro-batches of {micro_batch_size}: {advice}"
    )


def accumulation(num_packs: int, global_batch_size: int, world_size: int, micro_batch_size: int) -> int:
    """The number of micro-batches that each rank accumulates in a step: no more than an epoch of `num_packs` packs can
    fill. UserError as of `check_division`."""
    most = check_division(global_batch_size, world_size, micro_batch_size)
    return min(most, -(-num_packs // (world_size * micro_batch_size)))


def split_held_out(content: NDArray[np.uint64], size: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Holds samples out of training for validation.

    Takes content [num_samples], a hash of each sample's row, and a size: below 1 a share of the samples, from 1 on a
    number of them. Returns indices (train, held out), ascending. Samples of equal content are on the same side, so a
    few more than `size` may be held out. Added rows hardly change which samples are held out.
    """
    num_held_out = round(size * len(content)) if size < 1 else int(size)
    if not 0 < num_held_out < len(content):
        number = f"data.val_size to a number of samples from 1 to {len(content) - 1}, " if len(content) > 1 else ""
        raise UserError(
            f"{size:g} of {len(content)} sample{'s' * (len(content) != 1)} cannot be held out for validation: set "
            f"{number}data.val_size=0 for none, or data.val_path to a file of other rows"
        )
    mixed = _mix(content, seed)
    held_out = mixed <= np.partition(mixed, num_held_out - 1)[num_held_out - 1]
    if held_out.all():
        raise UserError(
            f"{size:g} held out for validation leaves nothing to train on, because copies of a row stay "
            "together: lower data.val_size"
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mix(content: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Orders hashes differently for each seed: SplitMix64's finaliser (Steele et al., OOPSLA 2014), one to one."""
    offset = np.random.default_rng(seed).integers(2**64, dtype=np.uint64)
    x = content.astype(np.uint64) + offset  # unsigned arithmetic wraps
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
