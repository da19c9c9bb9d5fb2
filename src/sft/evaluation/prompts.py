"""The held-out prompts that are answered while a run trains: which samples, and where in one the answer begins."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
from numpy.typing import NDArray

from sft.data.chat_template import PROBE, ChatTemplate
from sft.data.conversation import Message
from sft.data.labels import IGNORE
from sft.data.store import Store
from sft.errors import UserError

TRIED = 100  # samples of a source for each prompt wanted


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what its data answer, in token ids."""

    number: int
    source: str
    row: int
    ids: list[int]
    reference: list[int]


def choose(samples: Store, sets: Sequence[NDArray[np.int64]], num: int, max_new_tokens: int) -> list[Prompt]:
    """Up to `num` prompts, the same in each run on these samples; the first of more are those of fewer.

    They are taken in turn from each of the `sets` or, without any, from each source, in an order drawn once for all,
    and no row twice.
    """
    sources = samples.source_numbers
    groups = list(sets) or [np.flatnonzero(sources == number) for number in np.unique(sources)]
    seen: set[int] = set()

    def spans(group: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        for sample in group[np.random.default_rng(0).permutation(len(group))[: TRIED * num]].tolist():
            span = answer_span(samples[sample][1], max_new_tokens)
            if span and (content := int(samples.content[sample])) not in seen:
                seen.add(content)
                yield sample, *span

    in_turn = (found for turn in zip_longest(*map(spans, groups)) for found in turn if found)
    return [
        Prompt(
            number,
            samples.source(sample),
            samples.row(sample),
            samples[sample][0][:begin].tolist(),
            samples[sample][0][begin:end].tolist(),
        )
        for number, (sample, begin, end) in enumerate(islice(in_turn, num))
    ]


def answer_span(labels: NDArray[np.int32], most: int) -> tuple[int, int] | None:
    """Where the last response of a sample begins and ends. Where every token is learned, as of plain text, the first
    quarter is the prompt, and what follows is the reference as far as `most` tokens reach. None without a response, or
    with one of a single token, which is but the end of one."""
    learned = np.flatnonzero(labels != IGNORE)
    if len(learned) < 2:
        return None
    end = int(learned[-1]) + 1
    gaps = np.flatnonzero(np.diff(learned) > 1)
    begin = int(learned[gaps[-1] + 1]) if len(gaps) else int(learned[0])
    if begin <= 1:
        begin = max(1, end // 4)
        end = min(end, begin + most)
    return (begin, end) if end - begin > 1 else None


def question(chat: ChatTemplate, ids: list[int]) -> str:
    """A prompt for a reader: what the user asks, if that is all that it holds besides the template's words."""
    if not chat.source:
        return str(chat.tokenizer.decode(ids, skip_special_tokens=True))
    whole = str(chat.tokenizer.decode(ids))
    asked: list[Message] = [{"role": "user", "content": PROBE}]
    try:
        before, _, after = chat.render(asked, add_generation_prompt=True).partition(PROBE)
    except UserError:  # BadRow: the template wants more
        return whole
    inner = whole.removeprefix(before).removesuffix(after)
    is_single = len(inner) == len(whole) - len(before) - len(after) and not chat.special_text.search(inner)
    return inner if is_single else whole
