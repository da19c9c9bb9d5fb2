"""The plan is a function: of data, seed, epoch and global batch alone; ranks and accumulation only share it
out."""

from itertools import product

import numpy as np
import pytest

from sft.data.step_plan import (
    EpochPlan,
    Step,
    accumulation,
    check_division,
    default_step,
    epoch_plan,
    eval_plan,
    most_eval_samples,
    most_samples,
    num_steps,
    share,
    split_held_out,
)
from sft.errors import UserError

MAX_LENGTH = 64


@pytest.fixture
def lengths() -> np.ndarray:
    return np.random.default_rng(0).integers(2, 40, 203).astype(np.int32)


def plan_of(lengths: np.ndarray, *, seed: int = 0, epoch: int = 0, packing: bool = True, size: int = 8) -> EpochPlan:
    return epoch_plan(
        lengths,
        lengths // 2,
        seed=seed,
        epoch=epoch,
        global_batch_size=size,
        max_length=MAX_LENGTH,
        packing=packing,
    )


def samples_of(step: Step) -> list[int]:
    return np.concatenate(step.packs).tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_has_every_sample_once(lengths: np.ndarray, packing: bool) -> None:
    plan = plan_of(lengths, packing=packing)
    steps = [plan.step(k) for k in range(plan.num_steps)]
    assert sorted(i for step in steps for i in samples_of(step)) == list(range(len(lengths)))
    assert all(len(step.packs) == 8 for step in steps[:-1])
    assert 1 <= len(steps[-1].packs) <= 8
    assert all(lengths[samples].sum() <= MAX_LENGTH for step in steps for samples in step.packs)


def test_without_packing_a_pack_is_a_sample(lengths: np.ndarray) -> None:
    assert all(len(samples) == 1 for samples in plan_of(lengths, packing=False).packs)


def test_a_step_knows_its_tokens(lengths: np.ndarray) -> None:
    step = plan_of(lengths).step(3)
    assert step.num_tokens == sum(lengths[i] for i in samples_of(step))
    assert step.num_supervised == sum(lengths[i] // 2 for i in samples_of(step))


def test_a_step_knows_its_weight(lengths: np.ndarray) -> None:
    plain = plan_of(lengths).step(3)
    assert type(plain.weight) is float and plain.weight == plain.num_supervised
    sums = lengths * 0.25
    weighted = epoch_plan(
        lengths, lengths // 2, sums, seed=0, epoch=0, global_batch_size=8, max_length=MAX_LENGTH, packing=True
    ).step(3)
    assert weighted.weight == sum(lengths[i] / 4 for i in samples_of(weighted))
    # Weights change neither which samples form a step nor how many tokens are counted.
    assert (samples_of(weighted), weighted.num_supervised) == (samples_of(plain), plain.num_supervised)


def test_the_plan_is_a_function_of_seed_and_epoch(lengths: np.ndarray) -> None:
    first = [samples_of(plan_of(lengths).step(k)) for k in range(3)]
    assert first == [samples_of(plan_of(lengths).step(k)) for k in range(3)]
    assert first != [samples_of(plan_of(lengths, epoch=1).step(k)) for k in range(3)]
    assert first != [samples_of(plan_of(lengths, seed=1).step(k)) for k in range(3)]


def test_every_epoch_has_as_many_steps_in_other_company(lengths: np.ndarray) -> None:
    plans = [plan_of(lengths, epoch=epoch) for epoch in range(20)]
    assert len({len(plan.packs) for plan in plans}) == 1
    assert len({frozenset(frozenset(p.tolist()) for p in plan.packs) for plan in plans}) == 20


def test_a_step_that_is_not_there() -> None:
    with pytest.raises(AssertionError, match="step 1 of an epoch of 1"):
        plan_of(np.array([5, 5])).step(1)


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_and_accumulation_only_share_the_step_out(lengths: np.ndarray, packing: bool) -> None:
    plan = plan_of(lengths, packing=packing, size=12)
    for k, (world_size, micro_batch_size) in product((0, plan.num_steps - 1), [(1, 1), (2, 3), (4, 1), (6, 2)]):
        step = plan.step(k)
        accumulation = check_division(12, world_size, micro_batch_size)
        ranks = [
            share(
                step,
                lengths,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                accumulation=accumulation,
                rank=rank,
            )
            for rank in range(world_size)
        ]
        assert all(len(micro_batches) == accumulation for micro_batches in ranks)
        dealt = [samples for micro_batches in ranks for samples in micro_batches]
        assert all(samples.dtype == np.int64 for samples in dealt)
        assert sorted(np.concatenate(dealt).tolist()) == sorted(samples_of(step))
        whole = {frozenset(samples.tolist()) for samples in step.packs}
        for samples in dealt:
            inside = [each for each in whole if each <= set(samples.tolist())]
            assert len(inside) <= micro_batch_size
            assert sum(map(len, inside)) == len(samples), "a pack was torn apart"


def test_attention_cost_is_shared_evenly() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(5, 1, 20_000).clip(2, 2048).astype(np.int32)
    plan = epoch_plan(lengths, lengths, seed=0, epoch=0, global_batch_size=128, max_length=2048, packing=True)
    step = plan.step(0)

    def spread(ranks: list[list[np.ndarray]]) -> float:
        cost = [sum(int((lengths[samples].astype(np.int64) ** 2).sum()) for samples in mine) for mine in ranks]
        return float(max(cost) / np.mean(cost))

    shared = [share(step, lengths, world_size=8, micro_batch_size=1, accumulation=16, rank=rank) for rank in range(8)]
    assert spread(shared) < 1.05 < 1.2 < spread([step.packs[rank::8] for rank in range(8)])


def test_tokens_seen_are_those_of_the_steps_so_far() -> None:
    lengths = np.random.default_rng(0).integers(2, 90, 100).astype(np.int32)
    plan = epoch_plan(lengths, lengths // 3, seed=0, epoch=1, global_batch_size=3, max_length=128, packing=True)
    steps = [plan.step(k) for k in range(plan.num_steps)]
    assert len(steps[-1].packs) < 3
    expected = [
        [sum(step.num_tokens for step in steps[:k]), sum(step.num_supervised for step in steps[:k])]
        for k in range(plan.num_steps + 1)
    ]
    assert plan.seen.tolist() == expected
    assert expected[-1] == [lengths.sum(), (lengths // 3).sum()]


def test_snake_order() -> None:
    """Costs 6 5 4 3 2 1 to two ranks: 6, 3, 2 and 5, 4, 1."""
    lengths = np.array([1, 2, 3, 4, 5, 6])
    step = Step([np.array([i]) for i in range(6)], num_supervised=6, weight=6, num_tokens=21)
    deal = [
        [lengths[samples].tolist() for samples in
         share(step, lengths, world_size=2, micro_batch_size=2, accumulation=2, rank=rank)]
        for rank in range(2)
    ]  # fmt: skip
    assert deal == [[[6, 3], [2]], [[5, 4], [1]]]


def test_the_last_step_gives_every_rank_as_many_micro_batches() -> None:
    step = Step([np.array([0])], num_supervised=1, weight=1, num_tokens=2)
    shares = [
        share(step, np.array([2]), world_size=2, micro_batch_size=1, accumulation=2, rank=rank) for rank in range(2)
    ]
    assert [[samples.tolist() for samples in mine] for mine in shares] == [[[0], []], [[], []]]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (2, 3), (4, 1), (5, 2)])
def test_the_most_samples_of_any_rank(
    lengths: np.ndarray, packing: bool, world_size: int, micro_batch_size: int
) -> None:
    division = {"world_size": world_size, "micro_batch_size": micro_batch_size, "accumulation": 3}
    plan = plan_of(lengths, packing=packing, size=world_size * micro_batch_size * 3)
    for k in (0, plan.num_steps - 1):
        shares = [share(plan.step(k), lengths, **division, rank=rank) for rank in range(world_size)]
        expected = [max(1, *(len(mine[number]) for mine in shares)) for number in range(3)]
        assert most_samples(plan.step(k), lengths, **division) == expected
    settings = {"max_length": MAX_LENGTH, "packing": packing, "micro_batch_size": micro_batch_size}
    ranks = [eval_plan(lengths, **settings, world_size=world_size, rank=rank) for rank in range(world_size)]
    expected = [max(1, *map(len, batches)) for batches in zip(*ranks, strict=True)]
    assert most_eval_samples(lengths, **settings, world_size=world_size) == expected


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_sample_once_and_ranks_stay_in_step(
    lengths: np.ndarray, packing: bool, world_size: int
) -> None:
    ranks = [
        eval_plan(
            lengths,
            max_length=MAX_LENGTH,
            packing=packing,
            micro_batch_size=4,
            world_size=world_size,
            rank=rank,
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for samples in batches for i in samples.tolist()]
    assert sorted(seen) == list(range(len(lengths)))
    if not packing:
        assert ranks[0][0].tolist() == [0, 1, 2, 3]


def test_check_division() -> None:
    assert check_division(64, 8, 2) == 4
    assert check_division(64, 1, 64) == 1


@pytest.mark.parametrize(
    ("num_packs", "sizes", "expected"),
    [(11, (64, 8, 2), 1), (17, (64, 8, 2), 2), (64, (64, 8, 2), 4), (65, (64, 8, 2), 4), (11, (100_000, 1, 2), 6)],
)
def test_no_micro_batch_is_empty_in_every_step(num_packs: int, sizes: tuple[int, int, int], expected: int) -> None:
    assert accumulation(num_packs, *sizes) == expected


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ((60, 8, 2), "use a global batch size of 48 or 64$"),
        ((64, 8, 3), "use a global batch size of 48 or 72, or a micro-batch size of 2 or 4$"),
        ((2, 8, 1), "use a global batch size of 8$"),
        ((8, 8, 2), "use a global batch size of 16, or a micro-batch size of 1$"),
    ],
)
def test_a_division_that_leaves_a_rest(sizes: tuple[int, int, int], advice: str) -> None:
    with pytest.raises(UserError, match=advice) as caught:
        check_division(*sizes)
    assert str(caught.value).startswith(f"a global batch of {sizes[0]} packs does not divide among 8 ranks in")


def test_held_out_samples() -> None:
    content = np.random.default_rng(0).integers(2**64, size=1000, dtype=np.uint64)
    train, val = split_held_out(content, 0.1, seed=0)
    assert len(val) == 100
    assert sorted([*train, *val]) == list(range(1000))
    assert split_held_out(content, 100, seed=0)[1].tolist() == val.tolist()
    assert split_held_out(content, 100, seed=1)[1].tolist() != val.tolist()


def test_copies_of_a_row_are_held_out_together() -> None:
    content = np.random.default_rng(0).integers(2**64, size=100, dtype=np.uint64).repeat(3)
    train, val = split_held_out(content, 10, seed=0)
    assert 10 <= len(val) <= 12
    assert not set(content[train]) & set(content[val])


def test_who_is_held_out_hardly_changes_with_more_rows() -> None:
    content = np.random.default_rng(0).integers(2**64, size=1000, dtype=np.uint64)
    before = set(split_held_out(content[:950], 0.2, seed=0)[1])
    after = set(split_held_out(content, 0.2, seed=0)[1])
    assert len(before & after) > 0.9 * len(before)


@pytest.mark.parametrize("size", [0, 0.0001, 100, 200, -1])
def test_sizes_that_cannot_be_held_out(size: float) -> None:
    with pytest.raises(UserError, match=r"of 100 samples cannot be held out for validation: set data\.val_size"):
        split_held_out(np.arange(100, dtype=np.uint64), size, seed=0)


def test_copies_of_one_row_cannot_be_held_out() -> None:
    with pytest.raises(UserError, match="leaves nothing to train on, because copies of a row stay together"):
        split_held_out(np.zeros(100, dtype=np.uint64), 10, seed=0)


def test_a_step_left_open_is_16_packs_or_a_sixteenth_of_an_epoch() -> None:
    whole = np.full(16 * 16, 100, dtype=np.int32)  # each a pack of its own
    assert default_step(whole, 100, packing=True) == (16, 100)
    assert default_step(whole[:-1], 100, packing=True) == (15, 100)
    assert default_step(whole[:31], 100, packing=True) == (1, 100)
    assert default_step(whole[:48], 2048, packing=False) == (3, 2048)
    assert default_step(whole[:5], 2048, packing=False) == (1, 2048)


def test_a_file_that_fits_in_one_pack_has_16_steps_all_the_same() -> None:
    lengths = np.full(57, 20, dtype=np.int32)
    packs, tokens = default_step(lengths, 2048, packing=True)
    assert (packs, tokens) == (1, 72)  # 1140 / 16, rounded up: 3 samples
    plan = epoch_plan(lengths, lengths, seed=0, epoch=0, global_batch_size=packs, max_length=tokens, packing=True)
    assert plan.num_steps == 19
    assert sorted(np.concatenate(plan.packs).tolist()) == list(range(57))
    lengths[7] = 1000  # is not cut
    assert default_step(lengths, 2048, packing=True) == (1, 1000)


def test_the_steps_of_a_run() -> None:
    assert num_steps(3, None, 10) == 30
    assert num_steps(3, 7, 10) == 7
    assert num_steps(3, 70, 10) == 70
    assert num_steps(0.5, None, 3) == 2
    assert num_steps(0.1, None, 30) == 3
    assert num_steps(1e-9, None, 30) == 1
