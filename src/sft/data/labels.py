"""Text, turns and tokens → samples with their labels."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from sft.data.encoding import Encoder
from sft.data.rendering import Rendering, Turn

IGNORE = -100  # the label of a token that carries no loss


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens, each with its label: the token itself, or IGNORE. Labels are not shifted: the model
    predicts `labels[t]` from `input_ids[:t]`, so the first label is always IGNORE."""

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None  # of each token's loss; None: all 1, as nearly always


Ended = tuple[Sample, list[int]]  # a sample, and the token that ends each of its responses


def samples(encoder: Encoder, rendering: Rendering, ids: list[int] | None) -> Iterator[Ended]:
    """The samples of a text and its tokens: one, unless a token straddles where a response begins. Without tokens,
    special tokens' text is hidden in the text."""
    text = rendering.text
    spans = [(turn.begin, turn.end) for turn in rendering.turns]
    borders = iter([None] * len(spans)) if ids is None else encoder.borders(text, ids, spans)
    all_ends = None
    joined = _Joined(ids or [])
    for turn, border in zip(rendering.turns, borders, strict=True):
        if ids is not None and border is not None:
            begin, end = border
            ends = None
            if turn.untrained or turn.marked is not None:
                all_ends = all_ends or encoder.ends(text)
                ends = all_ends[begin:end]
            joined.learn(begin, _labels(turn, ids[begin:end], ends), turn.weight)
            continue
        if joined.stops:  # what the server is given next is no longer what the model has emitted
            yield joined.sample(), joined.stops
            joined = _Joined(ids or [])
        prompt, response = text[: turn.begin], text[turn.begin : turn.end]
        if ids is None:
            prompt_ids = encoder.as_text(prompt)[0]
            response_ids, ends = encoder.as_text(response)
        else:
            prompt_ids, response_ids, ends = encoder.apart(prompt, response)
        alone = _Joined(prompt_ids + response_ids)
        labels = _labels(turn, response_ids, [turn.begin + end for end in ends])
        alone.learn(len(prompt_ids), labels, turn.weight)
        yield alone.sample(), alone.stops
    if joined.stops:
        yield joined.sample(), joined.stops


def _labels(turn: Turn, ids: list[int], ends: list[int] | None) -> list[int]:
    """The labels of a response; `ends`: where in the text each token ends, if that decides them."""
    if ends is None:
        return ids
    marked, off = turn.marked, turn.untrained
    learned = [
        (marked is None or any(begin < end <= stop for begin, stop in marked))
        and not any(begin < end <= stop for begin, stop in off)
        for end in ends
    ]
    learned[-1] = any(learned)
    return [token if is_learned else IGNORE for token, is_learned in zip(ids, learned, strict=True)]


@dataclass
class _Joined:
    """A sample in the making: tokens, of which nothing is learned yet."""

    ids: list[int]
    labels: list[int] = field(default_factory=list)  # up to the end of the newest turn
    weights: list[tuple[int, int, float]] = field(default_factory=list)  # begin, end, weight of each turn
    stops: list[int] = field(default_factory=list)

    def learn(self, begin: int, labels: list[int], weight: float) -> None:
        """Adds a turn that begins after `begin` tokens."""
        self.labels += [IGNORE] * (begin - len(self.labels)) + labels
        self.weights.append((begin, len(self.labels), weight))
        self.stops.append(labels[-1])

    def sample(self) -> Sample:
        length = len(self.labels)
        if all(weight == 1.0 for _, _, weight in self.weights):
            return Sample(self.ids[:length], self.labels)
        weights = [0.0] * length
        for begin, end, weight in self.weights:
            weights[begin:end] = [0.0 if label == IGNORE else weight for label in self.labels[begin:end]]
        return Sample(self.ids[:length], self.labels, weights)
