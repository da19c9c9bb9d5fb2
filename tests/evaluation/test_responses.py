"""Columns of a validation against numbers by hand."""

from math import nan

import numpy as np
import pytest

from sft.data.labels import IGNORE
from sft.evaluation.base import FixedTokens, gain
from sft.evaluation.general_text import Pieces
from sft.evaluation.responses import Responses, columns, stop_trouble

STOP = 9


class Samples:
    def __init__(self, labels: list[list[int]], weights: list[list[float]] | None = None) -> None:
        self.labels = [np.array(each, np.int32) for each in labels]
        self.of_tokens = weights
        self.lengths = np.array([len(each) for each in labels], np.int32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return self.labels[i], self.labels[i]

    def weights(self, i: int) -> np.ndarray | None:
        return None if self.of_tokens is None else np.array(self.of_tokens[i], np.float32)


I = IGNORE  # noqa: E741
# Two turns that stop, one that is cut, one of 16 tokens.
LABELS = [[I, 1, 2, STOP, I, I, 4, STOP], [I, I, 5, 6], [I, *[7] * 15, STOP]]


def measured(labels: list[int], nll: list[float], stop: list[float]) -> np.ndarray:
    """Of the supervised tokens, of which the first, third, ... are the most probable ones."""
    tokens = [label for label in labels if label != IGNORE]
    assert len(tokens) == len(nll) == len(stop)
    correct = [float(place % 2 == 0) for place in range(len(tokens))]
    best_stops = [float(token == STOP and p > 0.5) for token, p in zip(tokens, stop, strict=True)]
    return np.array([nll, correct, stop, best_stops], np.float32)


def test_responses_are_stretches_of_supervised_tokens() -> None:
    found = Responses.of(Samples(LABELS), [STOP, 11])
    assert found.first.tolist() == [0, 2, 3, 4]
    assert found.length.tolist() == [3, 2, 2, 16]
    assert found.weight.tolist() == [3, 2, 2, 16]
    assert found.turn.tolist() == [0, 1, 0, 0]
    assert found.stops.tolist() == [True, True, False, True]


@pytest.mark.parametrize("order", [[[0, 1, 2]], [[2], [1, 0], []]], ids=["one batch", "three"])
def test_columns_by_hand(order: list[list[int]]) -> None:
    responses = Responses.of(Samples(LABELS), [STOP])
    of_samples = [
        measured(LABELS[0], [1, 2, 3, 4, 5], [0.5, 0.25, 0.75, 0.0, 0.25]),
        measured(LABELS[1], [6, 8], [1.0, 1.0]),
        measured(LABELS[2], [0.5] * 16, [0.0] * 15 + [1.0]),
    ]
    # As two ranks do it: each batch is added to a table of one of them.
    ranks = np.zeros((2, 4, 6))
    for number, batch in enumerate(order):
        together = np.concatenate([np.zeros((4, 0), np.float32), *(of_samples[sample] for sample in batch)], axis=1)
        responses.add(ranks[number % 2], np.array(batch, np.int64), together, None)
    sources = {"a": np.array([True, False, False]), "b": np.array([False, True, True])}
    found = columns(responses, ranks.sum(0), sources)
    assert found == pytest.approx(
        {
            "val/accuracy": (3 + 1 + 8) / 23,  # in each sample the 1st, 3rd, ... supervised token
            "val/loss_by_source/a": 15 / 5,
            "val/loss_by_source/b": 22 / 18,
            "val/loss_by_length/1-15": 29 / 7,
            "val/loss_by_length/16-63": 8 / 16,
            "val/loss_by_turn/1": (6 + 14 + 8) / 21,
            "val/loss_by_turn/2": 9 / 2,
            "val/stop_prob": (0.75 + 0.25 + 1) / 3,
            "val/stop_recall": 2 / 3,
            "val/stop_early": (1 - 0.5 * 0.75) / 3,
            "val/expected_length": ((1 + 0.5 + 0.375) / 3 + 1 + 1) / 3,
        }
    )


def test_weights_are_those_of_the_loss() -> None:
    weights = [[0, 1, 2, 3, 0, 0, 0, 0], [0, 0, 0.5, 0.5]]
    responses = Responses.of(Samples(LABELS[:2], weights), [STOP])
    assert responses.weight.tolist() == [6, 0, 1]
    sums = np.zeros((3, 6))
    both = [measured(LABELS[0], [1, 2, 3, 4, 5], [0] * 5), measured(LABELS[1], [6, 8], [0] * 2)]
    of_tokens = np.array([1, 2, 3, 0, 0, 0.5, 0.5], np.float32)
    responses.add(sums, np.array([0, 1]), np.concatenate(both, 1), of_tokens)
    found = columns(responses, sums, {})
    # The second turn weighs nothing, so there is only one that does.
    assert found.keys() == {"val/accuracy", "val/stop_prob", "val/stop_recall", "val/stop_early", "val/expected_length"}
    assert found["val/accuracy"] == (1 + 3 + 0.5) / 7
    assert responses.by_sample(sums[:, 0]).tolist() == [1 + 4 + 9, 7]


def test_without_stop_tokens_nothing_is_measured_of_them() -> None:
    responses = Responses.of(Samples([[I, 1, 2]]), [])
    sums = np.zeros((1, 6))
    responses.add(sums, np.array([0]), measured([I, 1, 2], [1, 1], [0, 0]), None)
    assert columns(responses, sums, {}) == {"val/accuracy": 0.5}


def test_where_nothing_weighs_anything_there_are_no_columns() -> None:
    responses = Responses.of(Samples([[I, 1, STOP]], [[0, 0, 0]]), [STOP])
    assert columns(responses, np.zeros((1, 6)), {}) == {}


def test_long_samples_of_text_are_cut_into_pieces_that_predict_all_but_their_first_token() -> None:
    pieces = Pieces(Samples([[1, 2, 3, 4, 5, 6, 7], [8, 9], [1, 2, 3, 4]]), 3)
    assert [pieces[i][0].tolist() for i in range(len(pieces))] == [[1, 2, 3], [4, 5, 6], [8, 9], [1, 2, 3]]
    assert [pieces[i][1].tolist() for i in (0, 1, 2)] == [[I, 2, 3], [I, 5, 6], [I, 9]]
    assert pieces.lengths.tolist() == [3, 3, 2, 3]


def test_fixed_tokens_are_spread_and_found_in_batches() -> None:
    lengths = np.array([3, 1, 5, 11], np.int32)  # 2 + 0 + 4 + 10 positions that predict a token
    fixed = FixedTokens.spread(lengths, 4)
    assert list(zip(fixed.sample, fixed.position, strict=True)) == [(2, 0), (3, 0), (3, 4), (3, 8)]
    assert FixedTokens.spread(lengths, 100).sample.tolist() == [0] * 2 + [2] * 4 + [3] * 10
    assert FixedTokens.spread(lengths, 100).position.tolist() == [0, 1, *range(4), *range(10)]
    numbers, positions = fixed.of_batch(np.array([3, 0, 2]), lengths)
    # In the order of the batch, whose first sample is number 3.
    assert numbers.tolist() == [1, 2, 3, 0] and positions.tolist() == [0, 4, 8, 14]
    numbers, positions = fixed.of_batch(np.array([], np.int64), lengths)
    assert numbers.tolist() == [] and positions.tolist() == [] and positions.dtype == np.int64


def test_the_error_of_the_gain_is_that_of_the_linearised_ratio() -> None:
    # R = (2 + 1 + 6) / (1 + 2 + 3) = 1.5; residuals 2 − 1.5, 1 − 3, 6 − 4.5; 3/2 · (0.25 + 4 + 2.25) = 9.75
    before, now, weight = np.array([3.0, 5.0, 9.0]), np.array([1.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0])
    assert gain(before, now, weight) == pytest.approx((1.5, 9.75**0.5 / 6))
    assert gain(before[:1], now[:1], weight[:1]) == (2.0, None)
    # Of samples that all weigh the same it is the standard error of a mean.
    draw = np.random.default_rng(0).normal(size=50)
    ratio, error = gain(draw, np.zeros(50), np.ones(50))
    assert (ratio, error) == pytest.approx((draw.mean(), draw.std(ddof=1) / 50**0.5))


@pytest.mark.parametrize(
    ("recall", "length", "part"),
    [(0.2, 1.0, "only 20% of the responses"), (0.9, 0.5, "50% of a reference's length"), (0.9, 0.9, None)],
)
def test_what_is_wrong_with_stopping_is_one_line(recall: float, length: float, part: str | None) -> None:
    line = stop_trouble({"val/stop_recall": recall, "val/expected_length": length})
    assert line is None if part is None else line and part in line and "\n" not in line
    assert stop_trouble({}) is None and stop_trouble({"val/stop_recall": nan}) is None
