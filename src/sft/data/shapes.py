"""The shapes of rows: each a row function with its arguments, as a file of `conf/data/` has them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sft.data.conversation import Row, columns
from sft.data.token_ids import MASKS
from sft.data.value import counted
from sft.errors import UserError

Arguments = dict[str, object]


class Shape(NamedTuple):
    """A file of `conf/data/`: its row function, with the defaults of its arguments."""

    words: str
    target: str
    arguments: Arguments
    required: tuple[str, ...]  # arguments that name columns which a row must have
    optional: Mapping[str, str] = {}  # ... may have, and the column that null means
    more: tuple[str, ...] = ()  # other columns that it reads


FROM_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "observation": "tool"}
CHAT: Arguments = {"tools": None, "system_column": None}
CHAT_OPTIONAL = {"tools": "tools", "system_column": "system"}
CHAT_MORE = ("parallel_tool_calls", "chat_template_kwargs")
MESSAGES: Arguments = {"column": "messages", "role": "role", "content": "content", "roles": None, **CHAT}
SHAREGPT: Arguments = {
    **{"column": "conversations", "role": "from", "content": "value"},
    **{"roles": {**FROM_ROLES, "function_call": "function_call"}, "tools": "tools", "system_column": None},
}
SHAPES = {
    "prompt_response": Shape(
        "prompt and response",
        "sft.data.conversation.prompt_response",
        {"prompt": "prompt", "response": "response", "system": None, "system_column": None, "chat": True},
        ("prompt", "response"),
        {"system_column": "system"},
    ),
    "alpaca": Shape(
        "Alpaca's instruction, input and output",
        "sft.data.conversation.alpaca",
        {
            **{"instruction": "instruction", "input": "input", "output": "output", "history": "history"},
            **{"system_column": None},
        },
        ("instruction", "output"),
        {"input": "input", "history": "history", "system_column": "system"},
    ),
    "messages": Shape("messages", "sft.data.conversation.messages", MESSAGES, ("column",), CHAT_OPTIONAL, CHAT_MORE),
    "sharegpt": Shape(
        "ShareGPT's conversations", "sft.data.conversation.messages", SHAREGPT, ("column",), CHAT_OPTIONAL, CHAT_MORE
    ),
    "conversational": Shape(
        "prompt and completion of messages",
        "sft.data.conversation.conversational",
        {"prompt": "prompt", "response": "completion", **CHAT},
        ("prompt", "response"),
        CHAT_OPTIONAL,
        CHAT_MORE,
    ),
    "pretokenized": Shape(
        "token ids",
        "sft.data.token_ids.pretokenized",
        {"column": "input_ids", "labels": None, "attention_mask": "attention_mask"},
        ("column",),
        {"labels": "labels", "attention_mask": "attention_mask"},
        MASKS,
    ),
    "text": Shape("plain text", "sft.data.conversation.text", {"column": "text"}, ("column",)),
}
# Arguments that name a column.
COLUMNS = {key for shape in SHAPES.values() for key in (*shape.required, *shape.optional)}


def check_columns(
    where: str, rows: Sequence[Row], function: str, arguments: Mapping[str, object], advice: str | None = None
) -> None:
    """UserError if none of the first rows has a column that the row function needs, or that was named.
    `advice`: what to do, where that is no setting."""
    shape = next((shape for shape in SHAPES.values() if shape.target == function), None)
    named = list(dict.fromkeys(column for row in rows for column in row))
    if shape is None or not rows:
        return
    for key in shape.required:
        column = arguments.get(key) or shape.arguments[key]
        if column not in named:
            given = f"the columns are {counted(named)}: {advice}" if advice else columns(dict.fromkeys(named))
            raise UserError(f"{where}: no column {column!r}: {given}")
    for key, default in shape.optional.items():
        column = arguments.get(key) or default
        if column not in (default, *named):
            raise UserError(
                f"{where}: no column {column!r}, which data.conversation.{key} names: the columns are {counted(named)}"
            )


def read_columns(shape: Shape, arguments: Mapping[str, object]) -> set[str]:
    """The columns that a row function reads, those included that a row may lack."""
    required = [arguments.get(key) or shape.arguments[key] for key in shape.required]
    optional = [arguments.get(key) or default for key, default in shape.optional.items()]
    return set(map(str, [*required, *optional, *shape.more]))
