"""Row → conversation: what a row of the user's data means.

A row function takes one row and returns a `Conversation`, or `Empty` with the reason if there is nothing to learn
from. `conf/data/*.yaml` names one with its arguments; yours may be in any module. It raises UserError for a malformed
row, without saying which row: the caller adds that.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sft.errors import UserError

Row = Mapping[str, object]
Message = dict[str, object]  # what the chat template takes: role, content, tool_calls, ...
Tools = list[dict[str, object]] | None  # JSON schemas


@dataclass(frozen=True)
class Conversation:
    """A chat (`messages`, and `tools` if it has any); with `messages` None plain text, or a row's own token ids.

    `weights`: what each message's loss is multiplied by, of which those of assistant messages count; 0 makes a message
    context, None is 1 for all. `template`: the row's own arguments for the chat template.
    """

    messages: list[Message] | None = None
    tools: Tools = None
    prompt: str = ""
    response: str = ""
    weights: tuple[float, ...] | None = None  # of each message
    template: Mapping[str, object] = field(default_factory=dict)
    input_ids: list[int] | None = None
    labels: list[int] | None = None  # of each of input_ids: the id, or -100


@dataclass(frozen=True)
class Empty:
    """A row with nothing to learn from: not a mistake, but counted."""

    reason: str


RowFunction = Callable[[Row], Conversation | Empty]

# Role names in use (ShareGPT's among them) → those of chat templates. `function_call` becomes an assistant's turn that
# calls tools.
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")},
    **{"human": "user", "gpt": "assistant", "observation": "tool"},
}

# Names of prompt and response in use.
PAIRS = (
    *(("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("input", "output")),
    *(("input", "target"), ("query", "response"), ("prompt", "completion"), ("prompt", "answer"), ("source", "target")),
)


def prompt_response(
    row: Row, *, prompt: str = "prompt", response: str = "response", system: str | None = None, chat: bool
) -> Conversation | Empty:
    """Two columns: a chat of [system, user, assistant], or plain text, concatenated unchanged."""
    if prompt not in row or response not in row:
        raise UserError(f"no column {prompt if prompt not in row else response!r}: {_other_columns(row)}")
    prompt_text, response_text = _string(row, prompt), _string(row, response)
    if not prompt_text.strip():
        return Empty("empty_prompt")
    if not response_text.strip():
        return Empty("empty_response")
    if not chat:
        return Conversation(prompt=prompt_text, response=response_text)
    turns = [("system", system)] if system else []
    turns += [("user", prompt_text), ("assistant", response_text)]
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
    """One column of messages, each a mapping with keys `role` and `content`; `roles` adds to or overrides ROLES.

    Other keys of a message (`tool_calls`, `reasoning_content`, `name`, ...) reach the template unchanged.
    `tools` names the column of tool schemas, a list or its JSON.
    """
    turns = _value(row, column)
    if not isinstance(turns, list):
        raise UserError(f"column {column!r} holds {_type(turns)}, not a list of messages")
    all_roles = {**ROLES, **(roles or {})}
    chat = [_message(turn, role, content, all_roles) for turn in turns]
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


def _other_columns(row: Row) -> str:
    """The columns that a row has, and what to set to read them."""
    columns = f"the columns are {', '.join(map(repr, row))}"
    (first, *others) = row
    for sign, word in ((";", "semicolons"), ("\t", "tabs")):
        if not others and sign in first:
            return f"{columns}: the file is separated by {word}: save it with commas"
    for name, shape in (("messages", "messages"), ("conversations", "sharegpt"), ("text", "text")):
        if name in row:
            return f"{columns}: set data={shape}"
    pair = next((pair for pair in PAIRS if set(pair) <= row.keys()), (first, others[-1] if others else "COLUMN"))
    return f"{columns}: set data.conversation.prompt={pair[0]} data.conversation.response={pair[1]}"


def _value(row: Row, column: str) -> object:
    if column not in row:
        raise UserError(f"no column {column!r}: the columns are {', '.join(map(repr, row))}")
    return row[column]


def _string(row: Row, column: str) -> str:
    value = _value(row, column)
    if value is not None and not isinstance(value, str):
        raise UserError(f"column {column!r} holds {_type(value)}, not a string")
    return value or ""


def _message(turn: object, role_key: str, content_key: str, roles: Mapping[str, str]) -> Message:
    if not isinstance(turn, Mapping) or role_key not in turn:
        keys = f"the keys {', '.join(map(repr, turn))}" if isinstance(turn, Mapping) else _type(turn)
        raise UserError(f"a message needs a key {role_key!r}, but this one has {keys}")
    role, content = turn[role_key], turn.get(content_key)
    if role not in roles:
        raise UserError(f"unknown role {role!r}: use one of {', '.join(roles)}, or map it in data.conversation.roles")
    if content is not None and not isinstance(content, str | list):
        raise UserError(f"the content of a message is {_type(content)}, not a string")
    if roles[role] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _tool_calls(_parsed(content, "a function_call"))}
    rest = {
        key: _without_nulls(value)
        for key, value in turn.items()
        if value is not None and key not in (role_key, content_key)
    }
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(rest["tool_calls"])
    return {"role": roles[role], "content": "" if content is None else _without_nulls(content), **rest}


def _tool_calls(calls: object) -> list[dict[str, object]]:
    return [_tool_call(call) for call in calls] if isinstance(calls, list) else [_tool_call(calls)]


def _tool_call(call: object) -> dict[str, object]:
    """In OpenAI's form, except that `arguments` is a mapping, as templates and the servers that use them expect."""
    outer = call if isinstance(call, Mapping) else {}
    function = outer.get("function", outer)
    if not isinstance(function, Mapping) or not {"name", "arguments"} <= function.keys():
        raise UserError(f"a tool call needs 'name' and 'arguments', but this one is {_short(call)}")
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _parsed(arguments, "a tool call's arguments")
    rest = {"id": outer["id"]} if "id" in outer else {}
    return {**rest, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(value: object, column: str) -> Tools:
    if not value:
        return None
    value = _parsed(value, f"column {column!r}") if isinstance(value, str) else _without_nulls(value)
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        raise UserError(f"column {column!r} holds {_short(value)}, not a list of tool schemas")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in value] or None


def _parsed(value: object, what: str) -> object:
    try:
        return json.loads(value)  # type: ignore[arg-type]  # TypeError unless it is a string
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is not JSON ({error}): {_short(value)}") from None


def _without_nulls(value: object) -> object:
    """Arrow gives each mapping of a column the keys of all, null where absent: a tool call would have the arguments of
    every other. To keep nulls that are meant, give the arguments or schemas as JSON strings.
    """
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_blank(content: object) -> bool:
    return not content or (isinstance(content, str) and not content.strip())


def _type(value: object) -> str:
    return "nothing (null)" if value is None else f"{_short(value)} ({type(value).__name__})"


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
