"""Which shape rows have, by their columns and the first rows: what data=auto stands for."""

from collections.abc import Mapping, Sequence
from itertools import product

from sft.data.candidates import Found, candidates, is_mappings, is_text, keys_of, listed, mostly, without_renderings
from sft.data.conversation import PAIRS, Conversation, Empty, Row, columns, is_preference
from sft.data.shapes import COLUMNS, SHAPES
from sft.data.token_ids import MASKS
from sft.data.value import counted
from sft.errors import UserError

NUM_ROWS = 20  # that are looked at
# What marks the turns of a chat that is already text.
MARKS = ("<|im_start|>", "<|start_header_id|>", "[INST]", "<start_of_turn>", "<|assistant|>", "<|start|>assistant")


def auto(row: Row, **asked: object) -> Conversation | Empty:
    """In the place of a row function until the first rows have been read; see `find`."""
    raise UserError("data=auto stands for a shape that the first rows decide: read them first (settle_data)")


def find(where: str, rows: Sequence[Row], asked: Mapping[str, object]) -> tuple[Found, str]:
    """The shape of some rows, and a line that says what they are taken for. `asked`: arguments that are set already.

    UserError with the nearest choices where no shape fits, more than one does, or the rows are preferences.
    """
    asked = {key: value for key, value in asked.items() if value is not None and (key, value) != ("chat", True)}
    named = list(dict.fromkeys(column for row in rows for column in row))
    _refuse_preferences(where, rows, named, asked)
    found = without_renderings(candidates(rows, named, asked), rows)
    if len(found) > 1:
        choices = ", or ".join(one.typed() for one in found)
        raise UserError(f"{where}: its rows have more than one shape (the columns are {counted(named)}): set {choices}")
    if not found:
        raise UserError(f"{where}: {_advice(rows, named, asked)}")
    (one,) = found
    words = SHAPES[one.name].words + (" with tools" if one.with_tools else "")
    unread = [column for column in named if column not in one.read]
    line = f"{where}: {words}, {len(named)} column{'' if len(named) == 1 else 's'}"
    line += f"; not read: {', '.join(unread)}" if unread else ""
    return one, f"{line} ({one.why}; {one.typed()})"


def chat_in_text(rows: Sequence[Row], column: str) -> str | None:
    """A mark by which the text of a column holds a chat."""
    texts = [value for row in rows if isinstance(value := row.get(column), str)]
    return next((mark for mark in MARKS if any(mark in text for text in texts)), None)


def _refuse_preferences(where: str, rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> None:
    if {"chosen", "rejected"} <= set(named) and not {"chosen", "rejected"} & set(map(str, asked.values())):
        is_chat = keys_of(rows, "chosen") == ("role", "content")
        shape = (
            "conversational" if is_chat and keys_of(rows, "prompt") else "messages" if is_chat else "prompt_response"
        )
        argument = "column" if shape == "messages" else "response"
        raise UserError(
            f"{where}: preference rows, with a chosen and a rejected answer, of which supervised fine-tuning can learn "
            f"the chosen alone: set data={shape} data.conversation.{argument}=chosen to train on those"
        )
    found = [one for one in candidates(rows, named, asked) if one.name not in ("text", "pretokenized")]
    if (
        "label" in named
        and any("label" not in one.arguments.values() for one in found)
        and mostly(rows, "label", is_preference)
    ):
        raise UserError(
            f"{where}: preference rows, whose column 'label' says whether the answer is good or bad; supervised "
            "fine-tuning would learn both alike: keep the rows with label true in a file without this column"
        )


def _advice(rows: Sequence[Row], named: Sequence[str], asked: Mapping[str, object]) -> str:
    """What to set where no shape fits."""
    missing = [str(value) for key, value in asked.items() if key in COLUMNS and value not in named]
    if missing:
        return f"no column {missing[0]!r}: {columns(dict.fromkeys(named))}"
    start = f"no shape fits its rows (the columns are {counted(named)})"
    if not rows:
        return "it has no row that can be read"
    lists = [column for column in named if mostly(rows, column, is_mappings)]
    if lists:
        turn = next(turn for row in rows if is_mappings(row.get(lists[0])) for turn in listed(row[lists[0]]))
        keys = [key for key, value in turn.items() if isinstance(value, str)] if isinstance(turn, Mapping) else []
        role, content = keys[:2] if len(keys) > 1 else ("ROLE", "CONTENT")
        return (
            f"{start}: set data=messages data.conversation.column={lists[0]} data.conversation.role={role} "
            f"data.conversation.content={content}, the keys of a message"
        )
    if "input_ids" in named:
        return f"{start}: token ids need a column 'labels', each the token's own id or -100, or a mask ({MASKS[0]})"
    texts = [column for column in named if mostly(rows, column, is_text)]
    if len(named) == 1 and texts:
        return f"{start}: set data=text data.conversation.column={texts[0]} to learn all of it"
    if len(texts) > 1:
        first, second = next((pair for pair in product(texts, texts) if pair in PAIRS), (texts[0], texts[1]))
        return f"{start}: set data.conversation.prompt={first} data.conversation.response={second}"
    return f"{start}: docs/data.md has the shapes, and how to add one"
