"""The responses of a validation set, and what a pass over them measures: accuracy, losses by group, stop tokens.

A response is a stretch of supervised tokens of a sample: a turn of the assistant. All sums are float64 and by response;
added up over the ranks they hold each response once, and every column is a function of them.

    accuracy          Σ w · [most probable token = y] / Σ w      over all supervised tokens, w their weights in the loss
    loss_by_.../G     Σ w · (−log p) / Σ w                       over the supervised tokens of the responses of group G

With p_t the probability of the stop tokens together at a response's token t = 1 ... n, given the reference before it,
and the last token, n, a stop token, a model that keeps to the reference until it stops writes token t with probability
Π_{s<t} (1 − p_s). So

    stop_prob         mean of p_n
    stop_recall       mean of [most probable token at n is a stop token]
    stop_early        mean of 1 − Π_{t<n} (1 − p_t)
    expected_length   mean of (1/n) Σ_t Π_{s<t} (1 − p_s)        E[min(length, n)] / n; 1: it never stops too early

each a mean over the responses that end in a stop token, all alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.data.batch import SampleSet
from sft.data.labels import IGNORE
from sft.runs.metric import LEAST_LENGTH, LEAST_RECALL

LENGTHS = {"1-15": 1, "16-63": 16, "64-255": 64, "256-1023": 256, "1024-up": 1024}  # name → fewest supervised tokens
TURNS = ("1", "2", "3", "4-up")
NUM_SUMS = 6  # of a response: weighted −log p, weighted correct tokens, and the four of its stop token


@dataclass(frozen=True)
class Responses:
    """What is known of a set's responses before any model has seen them."""

    first: NDArray[np.int64]  # [num_samples + 1]: sample s has the responses first[s] to first[s + 1]
    length: NDArray[np.int64]  # [num_responses], supervised tokens
    weight: NDArray[np.float64]  # [num_responses], the sum of their weights
    turn: NDArray[np.int64]  # [num_responses], from 0 in each sample
    stops: NDArray[np.bool_]  # [num_responses], whether it ends in a stop token

    @classmethod
    def of(cls, samples: SampleSet, stop_ids: Sequence[int]) -> "Responses":
        first, length, weight, turn, last = [0], [], [], [], []
        for index in range(len(samples)):
            labels, weights = samples[index][1], samples.weights(index)
            edges = np.flatnonzero(np.diff(labels != IGNORE, prepend=False, append=False))
            for number, (begin, end) in enumerate(edges.reshape(-1, 2).tolist()):
                length.append(end - begin)
                weight.append(end - begin if weights is None else weights[begin:end].sum(dtype=np.float64))
                turn.append(number)
                last.append(labels[end - 1])
            first.append(len(length))
        return cls(
            np.array(first), np.array(length), np.array(weight, np.float64), np.array(turn), np.isin(last, stop_ids)
        )

    def of_samples(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of these samples' responses, in the samples' order."""
        return np.concatenate([np.arange(0), *(np.arange(self.first[s], self.first[s + 1]) for s in samples)])

    def by_sample(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums of the values [num_responses] of each sample, [num_samples]."""
        num = np.diff(self.first)
        return np.bincount(np.repeat(np.arange(len(num)), num), values, len(num)).astype(np.float64)

    def add(
        self,
        sums: NDArray[np.float64],
        samples: NDArray[np.int64],
        measured: NDArray[np.float32],
        weights: NDArray[np.float32] | None,
    ) -> None:
        """Adds a batch to `sums` [num_responses, NUM_SUMS]. `measured` [4, N] is that of `token_measures`, of the
        supervised tokens of these samples, end to end; `weights` [N] are those of the tokens, None: all 1."""
        numbers = self.of_samples(samples)
        bounds = np.concatenate([[0], np.cumsum(self.length[numbers])])
        assert bounds[-1] == measured.shape[1], "a batch of other samples"
        nll, correct, stop, stops_here = measured.astype(np.float64)
        if weights is not None:
            nll, correct = nll * weights, correct * weights
        for number, begin, end in zip(numbers, bounds, bounds[1:], strict=False):
            going = np.cumprod(np.concatenate([[1.0], 1 - stop[begin : end - 1]]))  # Π_{s<t} (1 − p_s), t = 1 ... n
            at_end = (stop[end - 1], stops_here[end - 1], 1 - going[-1], going.sum() / len(going))
            sums[number] += (nll[begin:end].sum(), correct[begin:end].sum(), *at_end)


def columns(
    responses: Responses, sums: NDArray[np.float64], sources: Mapping[str, NDArray[np.bool_]]
) -> dict[str, float]:
    """The metrics of a pass, from the sums over all ranks. `sources` [num_samples each]: the samples of each source.

    Which columns there are is a function of the samples alone; none where no token weighs anything.
    """
    if not responses.weight.sum() > 0:
        return {}
    values = {"val/accuracy": _share(responses, sums[:, 1])}
    num = np.diff(responses.first)
    groups = {
        "source": {name: np.repeat(samples, num) for name, samples in sources.items()},
        "length": dict(zip(LENGTHS, _ranges(responses.length, [*LENGTHS.values()]), strict=True)),
        "turn": dict(zip(TURNS, _ranges(responses.turn, [*range(len(TURNS))]), strict=True)),
    }
    for kind, members in groups.items():
        present = {name: group for name, group in members.items() if responses.weight[group].sum() > 0}
        if len(present) > 1:
            values |= {f"val/loss_by_{kind}/{name}": _share(responses, sums[:, 0], g) for name, g in present.items()}
    if responses.stops.any():
        names = ("stop_prob", "stop_recall", "stop_early", "expected_length")
        means = sums[responses.stops, 2:].mean(0)
        values |= {f"val/{name}": float(mean) for name, mean in zip(names, means, strict=True)}
    return values


def _share(responses: Responses, sums: NDArray[np.float64], group: NDArray[np.bool_] | slice = slice(None)) -> float:
    return float(sums[group].sum() / responses.weight[group].sum())


def _ranges(values: NDArray[np.int64], least: list[int]) -> list[NDArray[np.bool_]]:
    """Which of the values are in each range, of which the next one's least is no more part."""
    which = np.searchsorted(least, values, side="right") - 1
    return [which == number for number in range(len(least))]


def stop_trouble(metrics: Mapping[str, float]) -> str | None:
    """What is wrong with how a trained model stops, and what to look at; None if nothing is, or nothing is known."""
    recall, length = metrics.get("val/stop_recall", 1.0), metrics.get("val/expected_length", 1.0)
    if recall < LEAST_RECALL:
        return (
            f"the stop token is the most probable one at the end of only {recall:.0%} of the responses "
            "(val/stop_recall), so answers run on: look whether responses end in it in preview.html, and train longer "
            "or at a higher optimizer.lr"
        )
    if length < LEAST_LENGTH:
        return (
            f"answers are expected to stop after {length:.0%} of a reference's length (val/expected_length): look "
            "whether the responses of training are shorter than those of validation, or hold the stop token before "
            "their end (preview.html)"
        )
    return None
