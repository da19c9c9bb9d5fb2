"""Which samples are prompts, where their answers begin, and how a reader sees them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sft.data.chat_template import ChatTemplate
from sft.evaluation.prompts import answer_span, choose, question
from sft.evaluation.scorers import exact, final_number, similarity


@pytest.mark.parametrize(
    ("labels", "span"),
    [
        ([-100, -100, 5, 6], (2, 4)),
        ([-100, -100, 5, 6, -100, -100, 7, 8, 9, -100], (6, 9)),  # of two turns, the last
        ([-100, 1, 2, 3, 4, 5, 6, 7], (2, 5)),  # of a text, a quarter, and 3 tokens after it
        ([-100, 1, 2], (1, 3)),
        ([-100, -100, 5], None),
        ([-100, -100, 5, 6, -100, 7], None),  # only the end of an answer is learned
        ([-100, -100], None),
    ],
)
def test_where_the_answer_begins_and_ends(labels: list[int], span: tuple[int, int] | None) -> None:
    assert answer_span(np.array(labels), most=3) == span


class Samples(list):
    """Of two sources, 6 and 3 rows; the first two rows are equal, the third has no response."""

    content = np.array([1, 1, 3, 4, 5, 6, 7, 8, 9])
    source_numbers = np.array([0] * 6 + [1] * 3)

    def source(self, sample: int) -> str:
        return "ab"[self.source_numbers[sample]]

    def row(self, sample: int) -> int:
        return sample


def test_prompts_are_taken_from_each_source_in_turn_and_fewer_are_the_first_of_more() -> None:
    pairs = [
        (np.array([9, 9, at, 1]), np.array([-100, -100, *([-100, -100] if at == 2 else [at, 1])])) for at in range(9)
    ]
    samples: Any = Samples(pairs)
    all_of_them = choose(samples, [], 20, 5)
    assert [prompt.source for prompt in all_of_them] == ["a", "b", "a", "b", "a", "b", "a"]
    assert sorted(prompt.row for prompt in all_of_them if prompt.row > 1) == [3, 4, 5, 6, 7, 8]
    assert [prompt.number for prompt in all_of_them] == [0, 1, 2, 3, 4, 5, 6]
    assert (all_of_them[0].ids, all_of_them[0].reference) == ([9, 9], [all_of_them[0].row, 1])
    assert choose(samples, [], 4, 5) == all_of_them[:4]
    sets = [np.array([8]), np.array([0, 2, 4])]
    assert [prompt.row for prompt in choose(samples, sets, 20, 5)] in ([8, 0, 4], [8, 4, 0])


def test_a_reader_sees_what_the_user_asks(tokenizer: PreTrainedTokenizerFast) -> None:
    chat = ChatTemplate(tokenizer)
    one = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    two = one + "Which?<|im_end|>\n" + one
    assert question(chat, tokenizer.encode(one)) == "How many?"
    assert question(chat, tokenizer.encode(two)) == two
    plain: Any = SimpleNamespace(source="", tokenizer=tokenizer)
    assert question(plain, [256, *tokenizer.encode("So it")]) == "So it"


def test_scores() -> None:
    assert [exact(" a\n", "a"), exact("A", "a")] == [1.0, 0.0]
    assert [similarity("abcd", "bcde"), similarity("", "")] == [0.75, 1.0]
    assert [
        final_number("So 7 + 35 = $1,042.", "It is\n#### 1042"),
        final_number("-3", "3"),
        final_number("none", "#### 4"),
        final_number("2.50", "2.5"),
        final_number("yes", "yes "),
    ] == [1.0, 0.0, 0.0, 1.0, 1.0]
