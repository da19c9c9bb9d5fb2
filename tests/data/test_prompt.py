"""What generation gives the model is, token by token, what training put before the response."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest

from sft.data.conversation import Conversation, alpaca, conversational, messages, prompt_response, text
from sft.data.labels import IGNORE
from sft.data.mask import Tokenization
from sft.data.prompt import prompt_column, served, served_ids, shown
from sft.data.token_ids import pretokenized
from sft.errors import UserError


@pytest.mark.parametrize(
    ("row_function", "row"),
    [
        (partial(prompt_response, chat=True), {"prompt": "Hi.", "response": "Ho"}),
        (partial(prompt_response, chat=True, system="Be kind."), {"prompt": "Hi.", "response": "Ho"}),
        (
            partial(prompt_response, chat=False, prompt="question", response="answer"),
            {"question": "Hi.", "answer": "Ho"},
        ),
        (
            partial(messages),
            {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho"}]},
        ),
        (partial(alpaca), {"instruction": "Hi.", "input": "", "output": "Ho"}),
        (
            partial(conversational),
            {"prompt": [{"role": "user", "content": "Hi."}], "completion": [{"role": "assistant", "content": "Ho"}]},
        ),
        (partial(text), {"text": "Hi.Ho"}),
    ],
    ids=["chat", "system", "plain", "messages", "alpaca", "conversational", "text"],
)
def test_served_as_trained(tokenizer: Any, row_function: Any, row: dict[str, Any]) -> None:
    (sample,) = Tokenization(tokenizer, max_length=100)(row_function(row)).samples
    asked = served_ids(tokenizer, row_function, "Hi.")
    assert sample.input_ids[: len(asked)] == asked
    if row_function.func is text:
        assert served_ids(tokenizer, row_function, row) == tokenizer("Hi.Ho").input_ids
    else:
        assert served_ids(tokenizer, row_function, row) == asked
        assert served(row_function, row)[1] == "Ho"
        assert sample.labels[len(asked) - 1] == IGNORE
        assert sample.labels[len(asked)] != IGNORE
        assert tokenizer.decode(sample.labels[len(asked) :]).startswith("Ho")


TURNS = [
    {"from": "system", "value": "Be kind."},
    {"from": "human", "value": "Weather?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
    {"from": "observation", "value": "rain"},
    {"from": "gpt", "value": "It rains."},
]
TOOLS = [{"name": "weather", "parameters": {}}]
WITH_TOOLS = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function.name }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("answered", [True, False])
def test_a_conversation_with_tools_is_served_as_trained(
    tokenizer: Any, answered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", WITH_TOOLS)
    row_function = partial(messages, column="conversations", role="from", content="value", tools="tools")
    row = {"conversations": TURNS, "tools": TOOLS}
    (sample,) = Tokenization(tokenizer, max_length=1000)(row_function(row)).samples
    asked = row if answered else row | {"conversations": TURNS[:-1]}
    ids = served_ids(tokenizer, row_function, asked)
    assert tokenizer.decode(ids) == (
        "<tool>weather</tool><|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWeather?<|im_end|>\n"
        "<|im_start|>assistant\n<call>weather</call><|im_end|>\n<|im_start|>tool\nrain<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert sample.input_ids[: len(ids)] == ids
    given, reference = served(row_function, asked)
    assert reference == ("It rains." if answered else None)
    assert [message["role"] for message in shown(given)] == ["system", "user", "assistant", "tool"]
    # An answer that is a tool call.
    given, reference = served(row_function, row | {"conversations": TURNS[:3]})
    assert shown(given) == "Weather?"
    function = {"name": "weather", "arguments": {"city": "Ulm"}}
    assert reference == {"content": "", "tool_calls": [{"type": "function", "function": function}]}


def own(row: Mapping[str, Any]) -> Conversation:
    return Conversation([{"role": "user", "content": row["q"]}, {"role": "assistant", "content": row["a"]}])


@pytest.mark.parametrize(
    ("row_function", "row", "prompt", "reference"),
    [
        (partial(prompt_response, chat=True, system="Be kind."), {"prompt": "Hi.", "response": "Ho"}, "Hi.", "Ho"),
        (partial(prompt_response, chat=True), {"prompt": "Hi."}, "Hi.", None),
        (partial(prompt_response, chat=True), {"prompt": "Hi.", "response": " "}, "Hi.", None),
        (partial(prompt_response, chat=False, response="a"), {"prompt": "Hi.", "a": None}, "Hi.", None),
        (partial(messages), {"messages": [{"role": "user", "content": "Hi."}]}, "Hi.", None),
        (partial(messages), {"messages": '[{"role": "user", "content": "Hi."}]'}, "Hi.", None),
        (partial(alpaca, output="a"), {"instruction": "Say", "input": "Hi."}, "Say\nHi.", None),
        (partial(alpaca), {"instruction": "Say", "input": "Hi.", "output": "Ho"}, "Say\nHi.", "Ho"),
        (partial(conversational), {"prompt": [{"role": "user", "content": "Hi."}]}, "Hi.", None),
        (
            partial(conversational, response="a"),
            {"prompt": [{"role": "user", "content": "Hi."}], "a": "Ho"},
            "Hi.",
            "Ho",
        ),
        (partial(pretokenized), {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}, [1, 5], None),
        (partial(text), {"text": "Hi."}, "Hi.", None),
        (own, {"q": "Hi.", "a": "Ho"}, "Hi.", "Ho"),
    ],
)
def test_a_row_with_or_without_an_answer(row_function: Any, row: dict[str, Any], prompt: str, reference: str) -> None:
    given, answer = served(row_function, row)
    assert (shown(given), answer) == (prompt, reference)


def test_a_row_without_a_prompt() -> None:
    for row_function, row, reason in (
        (partial(prompt_response, chat=True), {"prompt": " "}, "empty_prompt"),
        (partial(messages), {"messages": [{"role": "assistant", "content": "Ho"}]}, "empty_prompt"),
        (partial(alpaca), {"instruction": ""}, "empty_prompt"),
        (partial(conversational), {"prompt": []}, "empty_prompt"),
        (partial(text), {"text": ""}, "empty_response"),
    ):
        with pytest.raises(UserError, match=rf"there is nothing to answer \({reason}\)"):
            served(row_function, row)


def test_token_ids_are_continued_as_they_are(tokenizer: Any) -> None:
    row = {"input_ids": [1, 5, 6, 2, 7, 8, 2], "labels": [-100, -100, 6, 2, -100, 8, 2]}
    assert served_ids(tokenizer, partial(pretokenized), row) == [1, 5, 6, 2, 7]
    assert served_ids(tokenizer, partial(pretokenized), "Hi.") == tokenizer("Hi.").input_ids


def test_the_column_of_prompts() -> None:
    assert prompt_column(partial(prompt_response, chat=True)) == ("prompt", "prompt")
    assert prompt_column(partial(messages, column="chat")) == ("column", "chat")
    assert prompt_column(partial(alpaca)) == ("instruction", "instruction")
    assert prompt_column(partial(pretokenized)) == ("column", "input_ids")
    assert prompt_column(partial(own)) is None
