"""Row → conversation: what a row of the user's data means.

A row function takes one row and returns a `Conversation`, or `Empty` with the reason where there is nothing
to learn from. `conf/data/*.yaml` names one with its arguments; yours may live in any module. It raises
UserError for a row that is not what it should be, without saying which row: the caller knows.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sft.errors import UserError

Row = Mapping[str, Any]
Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Either a chat (`messages`, and `tools` where it has any) or, with `messages` None, plain text."""

    messages: list[Message] | None = None  # what the chat template takes: role, content, tool_calls, ...
    tools: list[dict[str, Any]] | None = None  # JSON schemas
    prompt: str = ""
    response: str = ""


@dataclass(frozen=True)
class Empty:
    """A row with nothing to learn from: no mistake, but counted."""

    reason: str


# Role names of the wild (ShareGPT's among them) → those of chat templates. `function_call` becomes an
# assistant's turn that calls tools.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")},
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
}


def prompt_response(
    row: Row, *, prompt: str = "prompt", response: str = "response", system: str | None = None, chat: bool
) -> Conversation | Empty:
    """Two columns: as a chat of [system, user, assistant], or as plain text, concatenated as they are."""
    asked, answer = _string(row, prompt), _string(row, response)
    if not asked.strip():
        return Empty("empty_prompt")
    if not answer.strip():
        return Empty("empty_response")
    if not chat:
        return Conversation(prompt=asked, response=answer)
    turns = [("system", system)] if system else []
    turns += [("user", asked), ("assistant", answer)]
    return Conversation(messages=[{"role": role, "content": content} for role, content in turns])


def messages(
    row: Row,
    *,
    column: str = "messages",
    role: str = "role",
    content: str = "content",
    roles: Mapping[str, str] | None = None,
    tools: str | None = None,
) -> Conversation | Empty:
    """One column of messages, each a mapping with keys `role` and `content`; `roles` adds to or overrides
    ROLES.

    Other keys of a message (`tool_calls`, `reasoning_content`, `name`, ...) reach the template as they are.
    `tools` names the column of tool schemas, a list or its JSON.
    """
    turns = _value(row, column)
    if not isinstance(turns, list):
        raise UserError(f"column {column!r} holds {_type(turns)}, not a list of messages")
    known = {**ROLES, **(roles or {})}
    chat = [_message(turn, role, content, known) for turn in turns]
    replies = [message for message in chat if message["role"] == "assistant"]
    if not replies:
        return Empty("no_assistant_turn")
    if any(_is_blank(reply.get("content")) and not reply.get("tool_calls") for reply in replies):
        return Empty("empty_response")
    return Conversation(messages=chat, tools=_tools(_value(row, tools), tools) if tools else None)


def text(row: Row, *, column: str = "text") -> Conversation | Empty:
    """One column of plain text, all of it learned."""
    response = _string(row, column)
    return Conversation(response=response) if response.strip() else Empty("empty_response")


def _value(row: Row, column: str) -> Any:
    if column not in row:
        raise UserError(f"no column {column!r}: there are {', '.join(map(repr, row))}")
    return row[column]


def _string(row: Row, column: str) -> str:
    value = _value(row, column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {column!r} holds {_type(value)}, not a string")
    return value or ""


def _message(turn: Any, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn:
        keys = f"the keys {', '.join(map(repr, turn))}" if isinstance(turn, Mapping) else _type(turn)
        raise UserError(f"a message needs a key {role_key!r}, but this one has {keys}")
    role, content = turn[role_key], turn.get(content_key)
    if role not in roles:
        raise UserError(
            f"unknown role {role!r}: the roles known are {', '.join(roles)}; name others in data.conversation.roles"
        )
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"the content of a message is {_type(content)}, not a string")
    if roles[role] == "function_call":
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _tool_calls(_parsed(content, "a function_call")),
        }
    rest = {k: _without_nulls(v) for k, v in turn.items() if v is not None and k not in (role_key, content_key)}
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"])
    return {"role": roles[role], "content": "" if content is None else _without_nulls(content), **rest}


def _tool_calls(calls: Any) -> list[dict[str, Any]]:
    """In OpenAI's form, but `arguments` a mapping, as templates (and the servers that call them) have it."""
    normal = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else call
        if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
            raise UserError(f"a tool call needs 'name' and 'arguments', but this one is {_short(call)}")
        arguments = function["arguments"]
        if isinstance(arguments, str):
            arguments = _parsed(arguments, "a tool call's arguments")
        rest = {key: value for key, value in call.items() if key == "id"}
        normal.append({**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return normal


def _tools(value: Any, column: str) -> list[dict[str, Any]] | None:
    if not value:
        return None
    value = _parsed(value, f"column {column!r}") if isinstance(value, str) else _without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"column {column!r} holds {_short(value)}, not a list of tool schemas")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value] or None


def _parsed(value: Any, what: str) -> Any:
    try:
        return json.loads(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is not JSON ({error}): {_short(value)}") from None


def _without_nulls(value: Any) -> Any:
    """Arrow gives each mapping of a column the keys of all, null where absent: a tool call would have the
    arguments of every other. Nulls that are meant can be kept by giving the arguments or schemas as JSON
    strings.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_blank(content: Any) -> bool:
    return not content or (isinstance(content, str) and not content.strip())


def _type(value: Any) -> str:
    return "nothing (null)" if value is None else f"{_short(value)} ({type(value).__name__})"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
