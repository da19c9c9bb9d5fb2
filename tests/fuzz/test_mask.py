"""Any row → a reason, or samples whose labels are their tokens or none."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from data.conftest import word_tokenizer
from sft.data import conversation as shapes
from sft.data.conversation import Conversation, Empty
from sft.data.labels import IGNORE
from sft.data.mask import Tokenization
from sft.data.token_ids import pretokenized
from sft.errors import BadRow, UserError

from .drawn import fuzz, said, scalars, texts, values

words = st.lists(
    st.sampled_from(("hi", "yes", " ", "\n", "<|end|>", "<|im_end|>", "<think>", "</think>", "</s>", "{", "}}", "é")),
    max_size=4,
).map("".join)
any_text = words | texts
contents = (
    any_text | st.none() | st.lists(any_text | st.fixed_dictionaries({"type": st.just("text"), "text": any_text}))
)
calls = st.fixed_dictionaries(
    {}, optional={"name": any_text, "arguments": values, "id": any_text, "function": st.deferred(lambda: calls)}
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(("user", "assistant", "system", "tool", "function_call", "human", "gpt")) | any_text},
    optional={
        "content": contents | values,
        "tool_calls": st.lists(calls, max_size=2) | values,
        "function_call": calls,
        "reasoning_content": contents | values,
        "thinking": any_text,
        "weight": st.sampled_from((0, 1, 0.5, -1, 1e9)) | scalars,
        "train": st.booleans() | scalars,
        "name": any_text,
    },
)
ids = st.lists(st.integers(-1, 300), max_size=5)
COLUMNS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(("prompt", "response", "instruction", "input", "output", "text", "system"), any_text | values),
    "history": st.lists(st.lists(any_text, min_size=2, max_size=2), max_size=2) | values,
    "messages": st.lists(turns, max_size=5) | values | st.lists(turns, max_size=3).map(json.dumps),
    "completion": st.lists(turns, max_size=2) | any_text | values,
    "tools": st.lists(calls, max_size=2) | values | st.lists(calls, max_size=2).map(json.dumps),
    "chat_template_kwargs": st.dictionaries(any_text, values, max_size=2) | values,
    "parallel_tool_calls": scalars,
    "input_ids": ids | values,
    "labels": ids | values,
    "attention_mask": st.lists(st.integers(0, 1), max_size=5) | values,
    "loss_mask": st.lists(st.integers(0, 1), max_size=5),
    "label": scalars,
}
MESSAGES = ("messages", "tools", "system", "chat_template_kwargs", "parallel_tool_calls", "label")
FUNCTIONS: dict[Callable[..., Conversation | Empty], tuple[str, ...]] = {
    shapes.prompt_response: ("prompt", "response", "system", "label"),
    shapes.alpaca: ("instruction", "input", "output", "history", "system", "label"),
    shapes.messages: MESSAGES,
    shapes.conversational: ("prompt", "completion", *MESSAGES[1:]),
    shapes.text: ("text",),
    pretokenized: ("input_ids", "labels", "attention_mask", "loss_mask"),
}


def settings(draw: Callable[[st.SearchStrategy[Any]], Any]) -> dict[str, Any]:
    return {
        "max_length": draw(st.sampled_from((4, 12, 100))),
        "supervise": draw(st.sampled_from(("response", "all"))),
        "overlong": draw(st.sampled_from(("drop", "truncate_prompt", "error"))),
        "train_on": draw(st.sampled_from(("all", "last"))),
        "train_reasoning": draw(st.booleans()),
        "train_tool_calls": draw(st.booleans()),
        "special_text": draw(st.sampled_from((None, "as_text", "as_tokens"))),
    }


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_any_row_is_samples_or_a_reason(
    function: Callable[..., Conversation | Empty], tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizers = [tokenizer, word_tokenizer(before="<s>", after="</s>")]
    columns = {name: COLUMNS[name] for name in FUNCTIONS[function]}
    prompts = {"prompt": COLUMNS["messages"]} if function is shapes.conversational else {}
    rows = st.fixed_dictionaries({}, optional=columns | prompts) | st.fixed_dictionaries(columns | prompts)
    made: dict[str, Tokenization] = {}

    @given(rows, st.sampled_from((0, 1)), st.data())
    def any_row(row: dict[str, Any], number: int, data: st.DataObject) -> None:
        before = repr(row)
        chosen = settings(data.draw)
        tokenization = made.setdefault(f"{number} {chosen}", Tokenization(tokenizers[number], **chosen))
        try:
            meant: Conversation | Empty | BadRow = function(row)
        except BadRow as error:
            said(error, "")
            meant = error
        assert repr(row) == before  # which others read too
        result = tokenization(meant)
        assert result.samples or result.reasons
        for sample in result.samples:
            size = len(sample.input_ids)
            assert size == len(sample.labels) <= chosen["max_length"]
            assert sample.labels[0] == IGNORE and {*sample.labels} != {IGNORE}
            for token, label in zip(sample.input_ids, sample.labels, strict=True):
                assert label in (token, IGNORE) and token >= 0
            if sample.weights is not None:
                pairs = zip(sample.weights, sample.labels, strict=True)
                assert all((weight == 0) if label == IGNORE else (0 <= weight <= 1e6) for weight, label in pairs)
                assert len(sample.weights) == size
        # Whatever came before it and is beside it.
        assert tokenization.batch([meant] * 3)[2] == result == Tokenization(tokenizers[number], **chosen)(meant)

    try:
        fuzz(any_row)
    except UserError as error:
        raise AssertionError(f"a row ended all: {error}") from error
