from itertools import pairwise

import numpy as np
import pytest

from sft.data.packing import pack


def packed(lengths: np.ndarray, max_length: int) -> list[list[int]]:
    """Each pack's sample lengths, after checking that every sample is in exactly one pack and none is too
    long."""
    order, starts = pack(lengths, max_length)
    assert order.dtype == starts.dtype == np.int64
    assert sorted(order.tolist()) == list(range(len(lengths)))
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    packs = [lengths[order[a:b]].tolist() for a, b in pairwise(starts)]
    assert all(0 < sum(each) <= max_length for each in packs)
    return packs


def test_a_pack_ends_with_the_most_even_pair_that_fills_it() -> None:
    assert packed(np.array([1, 6, 2, 3, 5, 4]), 12) == [[6, 4, 2], [5, 3, 1]]


def test_two_samples_of_one_length_are_needed_for_a_pair_of_it() -> None:
    assert packed(np.array([6, 3, 2]), 12) == [[6, 3, 2]]
    assert packed(np.array([6, 3, 3, 2]), 12) == [[6, 3, 3], [2]]


def test_samples_of_equal_length_are_used_in_input_order() -> None:
    order, starts = pack(np.array([5, 5, 5, 5]), 10)
    assert order.tolist() == [0, 1, 2, 3]
    assert starts.tolist() == [0, 2, 4]


def test_no_samples() -> None:
    order, starts = pack(np.array([], dtype=np.int32), 10)
    assert order.tolist() == []
    assert starts.tolist() == [0]


@pytest.mark.parametrize("lengths", [[0], [11]])
def test_lengths_that_fit_no_pack_are_refused(lengths: list[int]) -> None:
    with pytest.raises(AssertionError, match="fits no pack"):
        pack(np.array(lengths), 10)


@pytest.mark.parametrize("seed", range(50))
def test_every_sample_is_in_one_pack_and_the_number_of_packs_does_not_depend_on_their_order(
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    max_length = int(rng.integers(1, 80))
    lengths = rng.integers(1, max_length + 1, int(rng.integers(1, 300)))
    packs = packed(lengths, max_length)
    assert len(packed(rng.permutation(lengths), max_length)) == len(packs)
    assert sum(sum(each) <= max_length / 2 for each in packs) <= 1, "two packs would fit in one"


def test_packs_of_many_short_samples_are_full() -> None:
    """Lengths like those of GSM8K, none very short: best-fit decreasing fills 99.3 %."""
    lengths = np.random.default_rng(0).lognormal(5.1, 0.36, 100_000).clip(50, 600).astype(np.int32)
    _, starts = pack(lengths, 2048)
    assert lengths.sum() / ((len(starts) - 1) * 2048) > 0.999
