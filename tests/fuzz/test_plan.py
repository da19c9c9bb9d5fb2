"""Packs hold each sample once, steps each pack once, and ranks and resumes only share them out."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sft.data.packing import pack
from sft.data.step_plan import (
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

from .drawn import fuzz, said

sized = st.integers(1, 300).flatmap(
    lambda most: st.tuples(
        st.lists(st.integers(1, most), min_size=1, max_size=60).map(lambda values: np.array(values, np.int32)),
        st.just(most),
    )
)


def test_each_sample_is_in_one_pack_that_has_room() -> None:
    @given(sized)
    def packs(drawn: tuple[np.ndarray, int]) -> None:
        lengths, most = drawn
        order, starts = pack(lengths, most)
        assert sorted(order.tolist()) == [*range(len(lengths))]
        assert starts[0] == 0 and starts[-1] == len(lengths) and (np.diff(starts) > 0).all()
        sums = np.add.reduceat(lengths[order], starts[:-1])
        assert sums.max() <= most
        assert len(sums) <= 1 or np.sort(sums)[:2].sum() > most  # no two fit together
        again = pack(lengths[np.random.default_rng(0).permutation(len(lengths))], most)
        assert len(again[1]) == len(starts)  # whatever the order

    fuzz(packs, 50)


def test_a_plan_is_its_seed_s_and_ranks_share_each_step_out() -> None:
    @given(sized, st.booleans(), st.integers(0, 9), st.integers(0, 3), *[st.integers(1, 4)] * 3, st.data())
    def plans(
        drawn: tuple[np.ndarray, int],
        packing: bool,
        seed: int,
        epoch: int,
        ranks: int,
        micro: int,
        accumulation: int,
        data: st.DataObject,
    ) -> None:
        lengths, most = drawn
        supervised = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))))
        supervised = np.minimum(supervised, lengths).astype(np.int32)
        size = ranks * micro * accumulation
        settings = {"seed": seed, "epoch": epoch, "max_length": most, "packing": packing}
        plan = epoch_plan(lengths, supervised, global_batch_size=size, **settings)
        again = epoch_plan(lengths, supervised, global_batch_size=size, **settings)
        other = epoch_plan(lengths, supervised, global_batch_size=1, **settings)
        assert (
            [p.tolist() for p in plan.packs] == [p.tolist() for p in again.packs] == [p.tolist() for p in other.packs]
        )
        seen = []
        for number in range(plan.num_steps):
            step = again.step(number)  # of another process that resumes here
            assert [p.tolist() for p in step.packs] == [p.tolist() for p in plan.step(number).packs]
            samples = np.concatenate(step.packs)
            seen += samples.tolist()
            assert step.num_tokens == lengths[samples].sum() and step.num_supervised == supervised[samples].sum()
            cut = {"world_size": ranks, "micro_batch_size": micro, "accumulation": accumulation}
            shares = [share(step, lengths, **cut, rank=rank) for rank in range(ranks)]
            assert all(len(batches) == accumulation for batches in shares)
            assert sorted(np.concatenate([batch for batches in shares for batch in batches])) == sorted(samples)
            largest = [max(1, *(len(batches[a]) for batches in shares)) for a in range(accumulation)]
            assert most_samples(step, lengths, **cut) == largest
        assert sorted(seen) == [*range(len(lengths))]
        assert plan.seen[-1].tolist() == [lengths.sum(), supervised.sum()] and len(plan.seen) == plan.num_steps + 1

    fuzz(plans)


def test_validation_has_each_sample_once_over_all_ranks() -> None:
    @given(sized, st.booleans(), st.integers(1, 4), st.integers(1, 5))
    def passes(drawn: tuple[np.ndarray, int], packing: bool, micro: int, ranks: int) -> None:
        lengths, most = drawn
        cut = {"max_length": most, "packing": packing, "micro_batch_size": micro, "world_size": ranks}
        shares = [eval_plan(lengths, **cut, rank=rank) for rank in range(ranks)]
        assert len({len(batches) for batches in shares}) == 1
        assert sorted(np.concatenate([b for batches in shares for b in batches])) == [*range(len(lengths))]
        assert most_eval_samples(lengths, **cut) == [
            max(1, *map(len, at_once)) for at_once in zip(*shares, strict=True)
        ]
        step, room = default_step(lengths, most, packing)
        assert step >= 1 and lengths.max() <= room <= most

    fuzz(passes)


def test_sizes_divide_or_are_refused_and_equal_rows_stay_on_one_side() -> None:
    @given(
        *[st.integers(1, 200)] * 3,
        st.lists(st.integers(0, 20), min_size=1, max_size=50),
        st.floats(0, 0.999) | st.integers(1, 60),
        st.integers(0, 5),
        st.floats(0.001, 100),
    )
    def sizes(batch: int, ranks: int, micro: int, rows: list[int], held: float, seed: int, epochs: float) -> None:
        try:
            assert check_division(batch, ranks, micro) * ranks * micro == batch
        except UserError as error:
            said(error)
            divides = batch % (ranks * micro) == 0
            if divides:
                raise
        content = np.array(rows, np.uint64)
        try:
            train, validation = split_held_out(content, held, seed)
        except UserError as error:
            said(error)
        else:
            assert sorted([*train, *validation]) == [*range(len(rows))]
            assert not {*content[train]} & {*content[validation]}
        assert num_steps(epochs, None, batch) >= 1

    fuzz(sizes)
