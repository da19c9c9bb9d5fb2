"""Rows of the shapes in the wild → conversations."""

import json
from pathlib import Path
from typing import Any

import pytest

from sft.data.conversation import Conversation, Empty, messages, prompt_response, text
from sft.errors import UserError

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
    """Arguments as JSON are parsed: templates would quote them a second time. Nulls that Arrow put in are
    taken out, those in JSON are the user's."""
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
                    {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
                    {"type": "function", "function": {"name": "sub", "arguments": {"a": None}}},
                ],
            },
        ],
        tools=[{"type": "function", "function": {"name": "add", "parameters": {"a": {}}}}],
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
        (lambda: text({"a": "x", "b": "y"}), r"^no column 'text': the columns are 'a', 'b'$"),
        (lambda: text({"text": 5}), r"^column 'text' holds 5 \(int\), not a string$"),
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
            r"^a tool call's arguments is not JSON",
        ),
        (lambda: messages({**chat_row(role="user"), "t": "{"}, tools="t"), r"^column 't' is not JSON"),
        (
            lambda: messages({**chat_row(role="user"), "t": [1]}, tools="t"),
            r"^column 't' holds \[1\], not a list of",
        ),
        (lambda: messages(chat_row(role="user"), tools="t"), r"^no column 't': the columns are 'messages'$"),
    ],
)
def test_rows_that_are_not_what_they_should_be(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/tool_calls beside the project")
def test_real_tool_calls() -> None:
    rows = json.loads(REAL.read_text())
    made = [messages(r, column="conversations", role="from", content="value", tools="tools") for r in rows]
    assert all(isinstance(each, Conversation) for each in made)
    calls = [m for each in made for m in each.messages if "tool_calls" in m]  # type: ignore[union-attr]
    assert len(calls) == 211
    assert all(isinstance(m["tool_calls"][0]["function"]["arguments"], dict) for m in calls)
