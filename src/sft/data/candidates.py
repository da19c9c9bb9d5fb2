"""The shapes that some rows may have, by their columns and what these hold."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import NamedTuple

from sft.data.conversation import PAIRS, Row
from sft.data.shapes import SHAPES, Arguments, read_columns
from sft.data.token_ids import MASKS
from sft.data.value import as_text, counted, is_list, is_scalar, parsed
from sft.errors import BadRow


class Found(NamedTuple):
    """A shape that rows have, and why."""

    name: str  # of the file in `conf/data/`
    arguments: Arguments
    why: str
    with_tools: bool = False

    @property
    def read(self) -> set[str]:
        return read_columns(SHAPES[self.name], self.arguments)

    def typed(self) -> str:
        """As a person types it."""
        defaults = SHAPES[self.name].arguments
        own = {key: value for key, value in self.arguments.items() if value != defaults[key]}
        own |= {key: str(value).lower() for key, value in own.items() if isinstance(value, bool)}
        return " ".join([f"data={self.name}", *(f"data.conversation.{key}={value}" for key, value in own.items())])


def candidates(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    finders = (_token_ids, _conversational, _messages, _alpaca, _pairs, _plain)
    found: list[Found] = []
    for finder in finders:
        found += [
            one._replace(arguments={**SHAPES[one.name].arguments, **one.arguments, **asked})
            for one in finder(rows, named, asked)
            if asked.keys() <= SHAPES[one.name].arguments.keys()
            and all(asked.get(key, column) == column for key, column in one.arguments.items())
        ]
    names = {one.name for one in found}
    if "conversational" in names:  # its columns are also columns of messages
        found = [one for one in found if one.name not in ("messages", "sharegpt") or not _within(one, found)]
    if "alpaca" in names:
        found = [one for one in found if one.name != "prompt_response" or not _within(one, found)]
    return found


def _within(one: Found, found: Sequence[Found]) -> bool:
    """Whether another candidate, which reads more, reads all that this one needs."""
    shape = SHAPES[one.name]
    needed = {one.arguments[key] for key in shape.required}
    return any(needed <= other.read for other in found if other.name in ("alpaca", "conversational"))


def _token_ids(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    column = str(asked.get("column", "input_ids"))
    marks = [name for name in (asked.get("labels"), "labels", *MASKS) if name in named]
    if not marks or not mostly(rows, column, _is_ids):
        return []
    return [Found("pretokenized", {"column": column}, f"columns {column!r} and {marks[0]!r} hold numbers")]


def _conversational(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    prompt = str(asked.get("prompt", "prompt"))
    answers = [asked["response"]] if "response" in asked else ["completion", "response", "answer"]
    if keys_of(rows, prompt) != ("role", "content"):
        return []
    return [
        Found(
            "conversational",
            {"prompt": prompt, "response": answer},
            f"columns {prompt!r} and {answer!r} hold messages",
            _has_tools(rows, asked),
        )
        for answer in map(str, answers)
        if keys_of(rows, answer) == ("role", "content") or mostly(rows, answer, is_scalar)
    ]


def _messages(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    found = []
    for column in [str(asked["column"])] if "column" in asked else named:
        keys = keys_of(rows, column, (asked.get("role"), asked.get("content")))
        if keys is None:
            continue
        name = "sharegpt" if keys == ("from", "value") else "messages"
        why = f"column {column!r} holds lists of {keys[0]} and {keys[1]}"
        arguments: Arguments = {"column": column, "role": keys[0], "content": keys[1]}
        found.append(Found(name, arguments, why, _has_tools(rows, asked)))
    return found


def _alpaca(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    """Instruction and output with an input or a history: without those it is prompt and response."""
    instructions = _one_of(asked, "instruction", "instruction", "question")
    inputs = _one_of(asked, "input", "input", "context")
    outputs = _one_of(asked, "output", "output", "response", "answer")
    found = []
    for instruction, answer in product(instructions, outputs):
        more = next((name for name in inputs if mostly(rows, name, is_scalar)), None)
        history = str(asked.get("history", "history"))
        if not (more or history in named or {"instruction", "output"} & asked.keys()):
            continue
        if all(mostly(rows, name, is_scalar) for name in (instruction, answer)):
            arguments: Arguments = {"instruction": instruction, "output": answer, **({"input": more} if more else {})}
            read = [name for name in (instruction, more, answer) if name]
            found.append(Found("alpaca", arguments, f"columns {counted(read)} hold texts"))
    return found


def _pairs(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    prompts = _one_of(asked, "prompt", *(prompt for prompt, _ in PAIRS))
    responses = _one_of(asked, "response", *(response for _, response in PAIRS))
    return [
        Found("prompt_response", {"prompt": pair[0], "response": pair[1]}, f"columns {counted(pair)} hold texts")
        for pair in product(prompts, responses)
        if pair[0] != pair[1]
        and (pair in PAIRS or "prompt" in asked or "response" in asked)
        and all(mostly(rows, name, is_scalar) for name in pair)
    ]


def _plain(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> list[Found]:
    column = str(asked.get("column", "text"))
    found = Found("text", {"column": column}, f"column {column!r} holds texts")
    return [found] if mostly(rows, column, is_text) else []


def without_renderings(found: list[Found], rows: Sequence[Row]) -> list[Found]:
    """Leaves out shapes that hold again what another one holds: a text of prompt and response, or a prompt and a
    response that are in the messages, too."""
    chats = [one for one in found if one.name in ("messages", "sharegpt")]
    pairs = [one for one in found if one.name in ("prompt_response", "alpaca")]
    texts = [one for one in found if one.name == "text"]
    again: list[Found] = []
    for chat in chats:
        again += [pair for pair in pairs if all(_holds(row, str(chat.arguments["column"]), pair) for row in rows)]
    for text in texts:
        column = str(text.arguments["column"])
        again += [text for pair in pairs if all(_holds(row, column, pair) for row in rows)]
        again += [text for chat in chats if all(_holds_replies(row, column, chat) for row in rows)]
    return [one for one in found if one not in again]


def _holds(row: Row, column: str, pair: Found) -> bool:
    """Whether a column holds the response, too."""
    key = "output" if pair.name == "alpaca" else "response"
    value = row.get(str(pair.arguments[key]))
    whole = "\n".join(_texts(row.get(column)))
    return not is_scalar(value) or as_text(value, key).strip() in whole


def _holds_replies(row: Row, column: str, chat: Found) -> bool:
    whole = "\n".join(_texts(row.get(column)))
    return all(text.strip() in whole for text in _texts(row.get(str(chat.arguments["column"]))) if len(text) > 12)


def _texts(value: object) -> list[str]:
    """All texts within a value."""
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if is_list(value):
        return [text for inner in value for text in _texts(inner)]  # type: ignore[attr-defined]
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return [value, *_texts(parsed(value, ""))]
        except BadRow:
            pass
    return [value] if isinstance(value, str) else []


def _one_of(asked: Mapping[str, object], key: str, *names: str) -> list[str]:
    """The name that is set for an argument, or those in use."""
    return [str(asked[key])] if key in asked else list(dict.fromkeys(names))


def _has_tools(rows: Sequence[Row], asked: Mapping[str, object]) -> bool:
    values = [row.get(str(asked.get("tools", "tools"))) for row in rows]
    return any(value and str(value).strip() not in ("", "[]") for value in values)


def mostly(rows: Sequence[Row], column: str, fits: Callable[[object], bool]) -> bool:
    """Whether more than half of a column's values, and at least one, are such: one odd row decides nothing."""
    values = [value for row in rows if (value := row.get(column)) is not None]
    return sum(map(fits, values)) * 2 > len(values)


def keys_of(rows: Sequence[Row], column: str, asked: tuple[object, object] = (None, None)) -> tuple[str, str] | None:
    """The keys of role and content in a column's messages; None if it holds no messages."""
    for default in (("role", "content"), ("from", "value")):
        role, content = (str(own or usual) for own, usual in zip(asked, default, strict=True))

        def fits(value: object, role: str = role) -> bool:
            turns = listed(value)
            return bool(turns) and all(isinstance(turn, Mapping) and role in turn for turn in turns)

        if mostly(rows, column, fits):
            return role, content
    return None


def listed(value: object) -> list[object]:
    """A list, or the one that a JSON text holds; else empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parsed(value, "")
        except BadRow:
            return []
    return list(value) if is_list(value) else []  # type: ignore[call-overload]


def is_mappings(value: object) -> bool:
    turns = listed(value)
    return bool(turns) and all(isinstance(turn, Mapping) for turn in turns)


def _is_ids(value: object) -> bool:
    return is_list(value) and all(isinstance(token, int) for token in value)  # type: ignore[attr-defined]


def is_text(value: object) -> bool:
    return isinstance(value, str)
