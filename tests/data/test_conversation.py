"""Rows of the shapes in the wild → conversations."""

import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from sft.data.conversation import Conversation, Empty, Message, alpaca, conversational, messages, prompt_response, text
from sft.data.token_ids import pretokenized
from sft.errors import BadRow

REAL = Path(__file__).parents[3] / "shared/data/tool_calls/glaive_toolcall_en_demo.json"


def test_prompt_and_response_as_plain_text() -> None:
    made = prompt_response({"q": "Why? ", "a": "So."}, prompt="q", response="a", chat=False)
    assert made == Conversation(prompt="Why? ", response="So.")


def test_prompt_and_response_as_a_chat() -> None:
    made = prompt_response({"prompt": "Why?", "response": "So."}, system="Be good.", chat=True)
    assert made == Conversation(
        messages=[
            {"role": "system", "content": "Be good."},
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So."},
        ]
    )


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("blank", [None, "", " \n"])
def test_blank_prompts_and_responses_are_counted(chat: bool, blank: str | None) -> None:
    assert prompt_response({"prompt": blank, "response": "So."}, chat=chat) == Empty("empty_prompt")
    assert prompt_response({"prompt": "Why?", "response": blank}, chat=chat) == Empty("empty_response")


def test_text_has_no_prompt() -> None:
    assert text({"body": "So."}, column="body") == Conversation(prompt="", response="So.")
    assert text({"text": " "}) == Empty("empty_response")


def test_messages_keep_what_templates_read() -> None:
    reply = {"role": "assistant", "content": "So.", "reasoning_content": "hmm"}
    row = {"messages": [{"role": "user", "content": "Why?", "name": None}, reply]}
    assert messages(row) == Conversation(
        messages=[
            {"role": "user", "content": "Why?"},
            {"role": "assistant", "content": "So.", "reasoning_content": "hmm"},
        ]
    )


def test_role_names_of_the_wild() -> None:
    said = [("system", "Be good."), ("human", "Why?"), ("gpt", "So.")]
    made = messages({"turns": [{"from": r, "value": v} for r, v in said]}, column="turns", role="from", content="value")
    assert isinstance(made, Conversation)
    assert made.messages is not None
    assert [m["role"] for m in made.messages] == ["system", "user", "assistant"]


def test_role_names_of_the_users_own() -> None:
    row = {"messages": [{"role": "Q", "content": "Why?"}, {"role": "gpt", "content": "So."}]}
    made = messages(row, roles={"Q": "user"})
    assert made == Conversation(messages=[{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}])


def test_function_calls_of_sharegpt() -> None:
    call = {"name": "add", "arguments": {"a": 1, "b": None}}
    row = {
        "conversations": [
            {"from": "human", "value": "1 + ?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "1."},
        ],
        "tools": json.dumps([{"name": "add", "parameters": {"default": None}}]),
    }
    made = messages(row, column="conversations", role="from", content="value", tools="tools")
    assert made == Conversation(
        messages=[
            {"role": "user", "content": "1 + ?"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "1."},
        ],
        tools=[{"type": "function", "function": {"name": "add", "parameters": {"default": None}}}],
    )


def test_tool_calls_of_openai() -> None:
    """Arguments as JSON are parsed: templates would quote them a second time. Nulls are the user's: those that Arrow
    adds never get here."""
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
        {"id": None, "type": "function", "function": {"name": "sub", "arguments": '{"a": null}'}},
    ]
    row = {
        "messages": [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"a": {}, "b": None}}}],
    }
    made = messages(row, tools="tools")
    assert made == Conversation(
        messages=[
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}},
                    {"type": "function", "function": {"name": "sub", "arguments": {"a": None}}},
                ],
            },
        ],
        tools=[{"type": "function", "function": {"name": "add", "parameters": {"a": {}, "b": None}}}],
    )


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_a_row_without_tools(tools: Any) -> None:
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}],
        "tools": tools,
    }
    made = messages(row, tools="tools")
    assert isinstance(made, Conversation)
    assert made.tools is None


def test_conversations_with_nothing_to_learn_are_counted() -> None:
    asked = {"role": "user", "content": "?"}
    assert messages({"messages": [asked]}) == Empty("no_assistant_turn")
    assert messages({"messages": []}) == Empty("no_assistant_turn")
    blank = {"role": "assistant", "content": " "}
    assert messages({"messages": [asked, blank]}) == Empty("empty_response")
    assert messages({"messages": [asked, {"role": "assistant", "content": None}]}) == Empty("empty_response")


def chat_row(**message: Any) -> dict[str, Any]:
    return {"messages": [message, {"role": "assistant", "content": "!"}]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: text({"a": "x", "b": "y"}),
            r"^no column 'text': the columns are 'a', 'b': set data.conversation.prompt=a data\.conversation.resp",
        ),
        (lambda: text({"text": [5]}), r"^column 'text' holds \[5\] \(list\), not a string$"),
        (
            lambda: messages({"messages": "hi"}),
            r"^column 'messages' holds 'hi' \(str\), not a list of messages$",
        ),
        (
            lambda: messages({"messages": None}),
            r"^column 'messages' holds nothing \(null\), not a list of messages$",
        ),
        (
            lambda: messages({"messages": ["hi"]}),
            r"^a message needs a key 'role', but this one has 'hi' \(str\)$",
        ),
        (
            lambda: messages({"messages": [{"from": "x"}]}),
            r"needs a key 'role', but this one has the keys 'from'$",
        ),
        (
            lambda: messages(chat_row(role="bot", content="")),
            r"^unknown role 'bot': use one of system, dev",
        ),
        (
            lambda: messages(chat_row(role="user", content=5)),
            r"^the content of a message is 5 \(int\), not a string$",
        ),
        (
            lambda: messages(chat_row(role="function_call", content="{")),
            r"^a function_call is not JSON \(Expecting",
        ),
        (lambda: messages(chat_row(role="function_call", content=None)), r"^a function_call is not JSON"),
        (
            lambda: messages(chat_row(role="function_call", content="[5]")),
            r"^a tool call needs 'name' and 'arguments'",
        ),
        (
            lambda: messages(chat_row(role="assistant", tool_calls=[{"name": "a", "arguments": "{"}])),
            r"^the arguments of a call of 'a' is not JSON",
        ),
        (
            lambda: messages({**chat_row(role="user", content="?"), "t": "{"}, tools="t"),
            r"^column 't' is not JSON",
        ),
        (
            lambda: messages({**chat_row(role="user", content="?"), "t": {"a": 1}}, tools="t"),
            r"^column 't' holds \{'a': 1\}, not a list of",
        ),
        (
            lambda: messages({**chat_row(role="user", content="?"), "t": [1]}, tools="t"),
            r"^column 't' holds 1 among the tools, not a definition$",
        ),
    ],
)
def test_rows_that_are_not_what_they_should_be(make: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


USER: Message = {"role": "user", "content": "How warm is it in Graz?"}
WARM: Message = {"role": "assistant", "content": "12 degrees."}


def reason(make: Any) -> str:
    with pytest.raises(BadRow) as caught:
        make()
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        *((7, "7"), (1.5, "1.5"), (3e-11, "3e-11"), (True, "true"), (12345678901234567890, "12345678901234567890")),
        *((Decimal("1.50"), "1.50"), (datetime.date(2024, 5, 1), "2024-05-01")),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30:00"),
    ],
)
def test_a_number_or_a_date_is_its_text(value: Any, meant: str) -> None:
    made = prompt_response({"prompt": value, "response": value}, chat=False)
    assert made == Conversation(prompt=meant, response=meant)


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, b"a"])
def test_what_is_no_text_is_a_bad_row(value: Any) -> None:
    assert reason(lambda: prompt_response({"prompt": "?", "response": value})) == "not_a_text"
    assert reason(lambda: messages({"messages": [{"role": "user", "content": {"a": 1}}, WARM]})) == "not_a_text"


def test_a_system_message_of_its_own_column() -> None:
    row = {"prompt": "Why?", "response": "So.", "system": "Be good."}
    first = {"role": "system", "content": "Be good."}
    for made in (
        prompt_response(row),
        prompt_response({**row, "system": None, "s": "Be good."}, system="Be bad.", system_column="s"),
        alpaca({"instruction": "Why?", "output": "So.", "system": "Be good."}),
        messages({"messages": [{"role": "user", "content": "Why?"}, WARM], "system": "Be good."}),
        conversational({"prompt": [{"role": "user", "content": "Why?"}], "completion": "So.", "system": "Be good."}),
    ):
        assert isinstance(made, Conversation) and made.messages is not None
        assert made.messages[0] == first and len(made.messages) == 3
    twice = {"messages": [first, USER, WARM], "system": "Be good."}
    assert len(messages(twice).messages) == 3  # type: ignore[arg-type, union-attr]
    assert reason(lambda: messages({**twice, "system": "Be bad."})) == "two_system_messages"


def test_alpaca_with_input_and_history() -> None:
    row = {"instruction": "Say it twice.", "input": "ja", "output": "ja ja", "history": [["Hello.", "Hi."]]}
    assert alpaca(row) == Conversation(
        messages=[
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Say it twice.\nja"},
            {"role": "assistant", "content": "ja ja"},
        ]
    )
    alone: list[Message] = [{"role": "user", "content": "Sing."}, {"role": "assistant", "content": "La."}]
    more: Any
    for more in ({}, {"input": ""}, {"input": None, "history": None}, {"history": []}, {"history": "[]"}):
        assert alpaca({"instruction": "Sing.", "output": "La.", **more}) == Conversation(messages=alone)
    assert alpaca({"instruction": "Sing.", "output": "", "history": []}) == Empty("empty_response")
    assert alpaca({"instruction": " ", "output": "La."}) == Empty("empty_prompt")
    assert reason(lambda: alpaca({"instruction": "a", "output": "b", "history": [["x"]]})) == "not_a_history"
    assert reason(lambda: alpaca({"instruction": "a"})) == "no_column"


def test_prompt_and_completion_of_messages() -> None:
    """Assistant messages of the prompt are context."""
    prompt: list[Message] = [USER, {"role": "assistant", "content": "In Styria?"}, {"role": "user", "content": "Yes."}]
    made = conversational({"prompt": prompt, "completion": [WARM]})
    assert made == Conversation(messages=[*prompt, WARM], weights=(0.0, 0.0, 0.0, 1.0))
    as_json = {"prompt": json.dumps([USER]), "completion": json.dumps([WARM])}
    assert conversational(as_json) == Conversation(messages=[USER, WARM])
    assert conversational({"prompt": [USER], "answer": "12."}, response="answer") == Conversation(
        messages=[USER, {"role": "assistant", "content": "12."}]
    )
    assert conversational({"prompt": [], "completion": [WARM]}) == Empty("empty_prompt")
    assert conversational({"prompt": [USER], "completion": []}) == Empty("no_assistant_turn")
    assert reason(lambda: conversational({"prompt": "Why?", "completion": [WARM]})) == "not_messages"


def test_messages_as_a_json_text() -> None:
    assert messages({"messages": json.dumps([USER, WARM])}) == Conversation(messages=[USER, WARM])
    assert reason(lambda: messages({"messages": '[{"role": "user"'})) == "not_json"


def test_content_in_parts_is_their_text() -> None:
    parts = [{"type": "text", "text": "How warm "}, "is it", {"type": "input_text", "text": " in Graz?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": ["12 degrees."]}]}
    assert messages(row) == Conversation(messages=[USER, WARM])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "dog.png"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": ""}},
        {"type": "tool_use", "name": "f"},
        {"type": "text"},
        5,
    ],
)
def test_other_content_is_never_trained_without_it(part: Any) -> None:
    row = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}, WARM]}
    assert reason(lambda: messages(row)) == "other_content"


@pytest.mark.parametrize(
    "reply",
    [
        {"content": "43", "reasoning_content": "17 and 26."},
        {"content": "43", "reasoning": "17 and 26.", "thinking": None},
        {"content": "43", "thinking": "17 and 26.", "reasoning_content": "17 and 26."},
        {"content": [{"type": "thinking", "thinking": "17 and 26."}, {"type": "text", "text": "43"}]},
        {"content": [{"type": "reasoning", "text": "17 and 26."}, "43"]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "17 and 26."}]}, "43"]},
    ],
)
def test_reasoning_by_any_name(reply: dict[str, Any]) -> None:
    asked: Message = {"role": "user", "content": "17 + 26?"}
    made = messages({"messages": [asked, {"role": "assistant", **reply}]})
    expected: Message = {"role": "assistant", "content": "43", "reasoning_content": "17 and 26."}
    assert made == Conversation(messages=[asked, expected])


def test_reasoning_that_is_none_or_two() -> None:
    def reply(**keys: Any) -> Any:
        return messages({"messages": [USER, {**WARM, **keys}]})

    assert reply(reasoning="", thinking=None) == Conversation(messages=[USER, WARM])
    assert reason(lambda: reply(reasoning="a", thinking="b")) == "two_reasonings"
    assert reason(lambda: reply(thinking={"a": 1})) == "not_a_text"


CALL: dict[str, Any] = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Graz"}}}


@pytest.mark.parametrize("calls", [[CALL], [{"name": "weather", "arguments": '{"town": "Graz"}'}], CALL])
def test_tool_calls_by_any_form(calls: Any) -> None:
    made = messages({"messages": [USER, {"role": "assistant", "content": "", "tool_calls": calls}]})
    assert made == Conversation(messages=[USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}])


def test_the_older_function_call_of_openai() -> None:
    reply = {
        "role": "assistant",
        "content": None,
        "function_call": {"name": "weather", "arguments": '{"town": "Graz"}'},
    }
    result = {"role": "function", "name": "weather", "content": "12"}
    assert messages({"messages": [USER, reply, result]}) == Conversation(
        messages=[
            USER,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "12", "name": "weather"},
        ]
    )
    both = {**reply, "tool_calls": [CALL]}
    assert reason(lambda: messages({"messages": [USER, both]})) == "not_a_tool_call"


@pytest.mark.parametrize("none", [[], None])
def test_no_tool_calls_are_none(none: Any) -> None:
    assert messages({"messages": [USER, {**WARM, "tool_calls": none}]}) == Conversation(messages=[USER, WARM])


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        *(("", {}), (None, {}), (" ", {}), ("{}", {}), ({"s": None}, {"s": None}), ('{"s": 3}', {"s": 3})),
        *(("5", None), (5, None), ("[]", None), ([1], None), ('"{}"', None), ("null", None), ("{", "not_json")),
    ],
)
def test_arguments_are_an_object_or_its_json(arguments: Any, meant: Any) -> None:
    reply = {"role": "assistant", "tool_calls": [{"function": {"name": "wait", "arguments": arguments}}]}

    def make() -> Any:
        return messages({"messages": [USER, reply]})

    if isinstance(meant, dict):
        function = make().messages[1]["tool_calls"][0]["function"]
        assert function == {"name": "wait", "arguments": meant}
    else:
        assert reason(make) == (meant or "arguments_not_an_object")


def test_a_call_without_a_name_or_by_a_user_is_a_bad_row() -> None:
    nameless = {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}
    assert reason(lambda: messages({"messages": [USER, nameless]})) == "not_a_tool_call"
    assert reason(lambda: messages({"messages": [{**USER, "tool_calls": [CALL]}, WARM]})) == "tool_call_by_another"


THOUGHT = "It asks for the weather."
JSON_CALL = '{"name": "weather", "arguments": {"town": "Graz"}}'


@pytest.mark.parametrize(
    ("value", "rest"),
    [
        (JSON_CALL, {}),
        (f"[{JSON_CALL}]", {}),
        (json.loads(JSON_CALL), {}),
        ([json.loads(JSON_CALL)], {}),
        (f"<think>{THOUGHT}</think>\n\n{JSON_CALL}", {"reasoning_content": THOUGHT}),
        (f"Let me look {{that}} up.\n{JSON_CALL}\n", {"content": "Let me look {that} up."}),
        (
            f"<think>{THOUGHT}</think>One moment. [{JSON_CALL}]",
            {"reasoning_content": THOUGHT, "content": "One moment."},
        ),
    ],
)
def test_function_calls_of_sharegpt_as_json_or_after_a_thought(value: Any, rest: dict[str, str]) -> None:
    turns = [{"from": "human", "value": USER["content"]}, {"from": "function_call", "value": value}]
    made = messages({"c": turns}, column="c", role="from", content="value")
    assert made == Conversation(messages=[USER, {"role": "assistant", "content": "", **rest, "tool_calls": [CALL]}])


@pytest.mark.parametrize(
    "value", ["It rains.", f"[{JSON_CALL}", JSON_CALL[:-1], f"see [{JSON_CALL}", "<think>a</think>", ""]
)
def test_a_function_call_that_is_none_is_a_bad_row(value: str) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "function_call", "value": value}]
    assert reason(lambda: messages({"c": turns}, column="c", role="from", content="value")) == "not_json"


def test_weights_of_messages() -> None:
    def weights(*keys: dict[str, Any]) -> Any:
        turns = [turn for own in keys for turn in (USER, {**WARM, **own})]
        made = messages({"messages": turns})
        assert isinstance(made, Conversation)
        assert made.messages == [USER, WARM] * len(keys)  # the template reads neither key
        return made.weights

    assert weights({}, {"weight": 1, "train": True}, {"train": 1}, {"weight": None}) is None
    assert weights({"weight": 0}, {"weight": 0.5}) == (1.0, 0.0, 1.0, 0.5)
    assert weights({"train": False}, {"train": 0, "weight": 2}, {"weight": 2}) == (1.0, 0.0, 1.0, 0.0, 1.0, 2.0)
    # float32, as they are stored, makes 0 or infinity of the last four.
    for wrong in (-1, float("nan"), float("inf"), "1", True, [1], 1e-50, 1e39, 10**400, Decimal("1e-60")):
        assert reason(lambda: weights({"weight": wrong})) == "bad_weight"  # noqa: B023
    for wrong in (2, "yes", 0.5):
        assert reason(lambda: weights({"train": wrong})) == "bad_weight"  # noqa: B023


def test_a_blank_answer_may_be_context_and_no_more() -> None:
    blank: Message = {"role": "assistant", "content": ""}
    assert messages({"messages": [USER, blank, USER, WARM]}) == Empty("empty_response")
    made = messages({"messages": [USER, {**blank, "weight": 0}, USER, WARM]})
    assert made == Conversation(messages=[USER, blank, USER, WARM], weights=(1.0, 0.0, 1.0, 1.0))


def test_tools_and_arguments_of_the_template() -> None:
    tools = [{"name": "weather", "parameters": {"properties": {"town": {"default": None}}}}]
    row = {"messages": [USER, WARM], "tools": json.dumps(tools), "parallel_tool_calls": False}
    assert messages(row) == Conversation(
        messages=[USER, WARM],
        tools=[{"type": "function", "function": tools[0]}],
        template={"parallel_tool_calls": False},
    )
    given = {"messages": [USER, WARM], "chat_template_kwargs": {"enable_thinking": False}}
    assert messages(given) == Conversation(messages=[USER, WARM], template={"enable_thinking": False})
    odd = {"messages": [USER, WARM], "chat_template_kwargs": "[]"}
    assert reason(lambda: messages(odd)) == "not_an_object"


@pytest.mark.parametrize("role", ["moderator", None, 5, ["user"]])
def test_a_role_that_is_unknown_is_a_bad_row(role: Any) -> None:
    assert reason(lambda: messages({"messages": [{"role": role, "content": "?"}, WARM]})) == "unknown_role"


def test_a_message_whose_text_has_another_key_is_a_bad_row() -> None:
    assert reason(lambda: messages({"messages": [{"role": "user", "text": "?"}, WARM]})) == "no_content"


@pytest.mark.parametrize("label", [True, False, "true", "False"])
def test_a_preference_is_never_trained_as_it_is(label: Any) -> None:
    said = {"prompt": "?", "response": "!", "instruction": "?", "output": "!", "messages": [USER, WARM], "label": label}
    for function in (prompt_response, alpaca, messages):
        assert reason(lambda: function(said)) == "preference_row"  # noqa: B023
    assert prompt_response(said, response="label", chat=False) == Conversation(
        prompt="?", response=str(label).lower() if label is True or label is False else label
    )
    assert isinstance(messages({**said, "label": "a"}), Conversation)
    assert messages({"chosen": [USER, WARM], "rejected": []}, column="chosen") == Conversation(messages=[USER, WARM])


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]},
        {"input_ids": [1, 5, 6, 2], "loss_mask": [0, 0, 1, 1]},
        {"input_ids": [1, 5, 6, 2], "completion_mask": [False, False, True, True]},
        {"input_ids": [1, 5, 6, 2, 0], "labels": [-100, -100, 6, 2, -100], "attention_mask": [1, 1, 1, 1, 0]},
        {"input_ids": [0, 1, 5, 6, 2], "assistant_masks": [0, 0, 0, 1, 1], "attention_mask": [0, 1, 1, 1, 1]},
    ],
)
def test_token_ids_with_labels_or_a_mask(row: dict[str, Any]) -> None:
    assert pretokenized(row) == Conversation(input_ids=[1, 5, 6, 2], labels=[-100, -100, 6, 2])


def test_a_mask_of_another_name() -> None:
    made = pretokenized({"ids": [1, 5], "learn": [0, 1]}, column="ids", labels="learn")
    assert made == Conversation(input_ids=[1, 5], labels=[-100, 5])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"input_ids": [1, 5], "labels": [5, -100]}, "not_labels"),  # shifted
        ({"input_ids": [1, 5], "labels": [-100, 5.0]}, "not_token_ids"),
        ({"input_ids": [1.0, 5.0], "labels": [-100, 5]}, "not_token_ids"),
        ({"input_ids": "1 5", "labels": [-100, 5]}, "not_token_ids"),
        ({"input_ids": [1, -5], "labels": [-100, -5]}, "not_token_ids"),
        ({"input_ids": [1, 5], "labels": [-100]}, "lengths_differ"),
        ({"input_ids": [1, 5], "loss_mask": [0, 1, 1]}, "lengths_differ"),
        ({"input_ids": [1, 5], "loss_mask": [0, 2]}, "not_a_mask"),
        ({"input_ids": [1, 5], "labels": [-100, 5], "attention_mask": [1, 7]}, "not_a_mask"),
        ({"input_ids": [1, 5]}, "no_column"),
        ({"labels": [1, 5]}, "no_column"),
    ],
)
def test_token_ids_that_are_not_what_they_should_be(row: dict[str, Any], why: str) -> None:
    assert reason(lambda: pretokenized(row)) == why


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/tool_calls beside the project")
def test_real_tool_calls() -> None:
    rows = json.loads(REAL.read_text())
    made = [messages(r, column="conversations", role="from", content="value", tools="tools") for r in rows]
    assert all(isinstance(each, Conversation) for each in made)
    calls: list[Any] = [m for each in made for m in each.messages if "tool_calls" in m]  # type: ignore[union-attr]
    assert len(calls) == 211
    assert all(isinstance(m["tool_calls"][0]["function"]["arguments"], dict) for m in calls)
