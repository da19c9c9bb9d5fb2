"""Rows of every shape in use are found by themselves, or refused with what to set."""

import json
import re
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import pytest

from pages import PAGES, ROOT
from sft.data.conversation import Conversation
from sft.data.shape import find
from sft.data.shapes import SHAPES
from sft.errors import UserError

CHAT = [{"role": "user", "content": "Name a lake."}, {"role": "assistant", "content": "Como is one of them."}]
SHAREGPT = [{"from": "human", "value": "Name a lake."}, {"from": "gpt", "value": "Como."}]
TOOLS = [{"name": "f", "parameters": {}}]


@pytest.mark.parametrize(
    ("row", "typed"),
    [
        ({"prompt": "?", "response": "!"}, "data=prompt_response"),
        (
            {"question": "?", "answer": 5, "id": 3},
            "data=prompt_response data.conversation.prompt=question data.conversation.response=answer",
        ),
        (
            {"instruction": "?", "output": "!"},
            "data=prompt_response data.conversation.prompt=instruction data.conversation.response=output",
        ),
        (
            {"input": "?", "target": "!"},
            "data=prompt_response data.conversation.prompt=input data.conversation.response=target",
        ),
        ({"instruction": "?", "input": "", "output": "!"}, "data=alpaca"),
        ({"instruction": "?", "output": "!", "history": []}, "data=alpaca"),
        (
            {"instruction": "?", "context": "x", "response": "!", "category": "c"},
            "data=alpaca data.conversation.input=context data.conversation.output=response",
        ),
        ({"messages": CHAT}, "data=messages"),
        ({"messages": CHAT, "prompt": "Name a lake.", "prompt_id": "a"}, "data=messages"),
        ({"messages": CHAT, "tools": TOOLS}, "data=messages"),
        ({"dialog": CHAT}, "data=messages data.conversation.column=dialog"),
        ({"conversations": SHAREGPT, "system": "x", "tools": ""}, "data=sharegpt"),
        ({"conversations": CHAT}, "data=messages data.conversation.column=conversations"),
        ({"messages": '[{"role": "user", "content": "?"}]'}, "data=messages"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "data=conversational"),
        ({"prompt": CHAT[:1], "answer": "Como."}, "data=conversational data.conversation.response=answer"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "data=pretokenized"),
        ({"input_ids": [1, 2], "attention_mask": [1, 1], "completion_mask": [0, 1]}, "data=pretokenized"),
        ({"text": "abc", "url": "x"}, "data=text"),
        # What another column holds again is no shape of its own.
        ({"instruction": "?", "input": "", "output": "!", "text": "### Instruction: ? ### Response: !"}, "data=alpaca"),
        ({"messages": CHAT, "text": "USER: Name a lake. ASSISTANT: Como is one of them."}, "data=messages"),
        ({"messages": CHAT, "question": "Name a lake.", "answer": "Como is one of them."}, "data=messages"),
    ],
)
def test_a_shape_is_found_by_columns_and_rows(row: dict[str, Any], typed: str) -> None:
    found, line = find("my.jsonl", [row, row], {})
    assert found.typed() == typed
    assert line.startswith("my.jsonl: ") and line.endswith(f"; {typed})") and "\n" not in line


def test_the_line_says_what_is_not_read_and_why() -> None:
    row = {"messages": CHAT, "tools": TOOLS, "id": 1, "source": "x"}
    assert find("my.jsonl", [row], {})[1] == (
        "my.jsonl: messages with tools, 4 columns; not read: id, source (column 'messages' holds lists of role and "
        "content; data=messages)"
    )
    assert find("a.csv", [{"text": "x"}], {})[1] == (
        "a.csv: plain text, 1 column (column 'text' holds texts; data=text)"
    )


def test_one_odd_row_decides_nothing() -> None:
    rows: list[dict[str, Any]] = [{"messages": "hi"}, {"messages": CHAT}, {"messages": CHAT}, {"messages": None}]
    assert find("my.jsonl", rows, {})[0].typed() == "data=messages"


@pytest.mark.parametrize(
    ("asked", "row", "typed"),
    [
        (
            {"prompt": "a", "response": "b"},
            {"a": "?", "b": "!", "prompt": "x", "response": "y"},
            "data=prompt_response data.conversation.prompt=a data.conversation.response=b",
        ),
        (
            {"response": "answer"},
            {"prompt": "?", "response": "!", "answer": "!!"},
            "data=prompt_response data.conversation.response=answer",
        ),
        ({"chat": False}, {"prompt": "?", "response": "!"}, "data=prompt_response data.conversation.chat=false"),
        ({"chat": True}, {"messages": CHAT}, "data=messages"),
        ({"column": "a"}, {"a": CHAT, "messages": CHAT}, "data=messages data.conversation.column=a"),
        ({"column": "body"}, {"body": "x", "title": "y"}, "data=text data.conversation.column=body"),
        ({"column": "chosen"}, {"chosen": CHAT, "rejected": CHAT}, "data=messages data.conversation.column=chosen"),
        (
            {"role": "who", "content": "said"},
            {"messages": [{"who": "user", "said": "?"}]},
            "data=messages data.conversation.role=who data.conversation.content=said",
        ),
        ({"system": "Be good."}, {"prompt": "?", "response": "!", "messages": CHAT}, "data=prompt_response data.conve"),
    ],
)
def test_an_argument_that_is_set_decides(asked: dict[str, Any], row: dict[str, Any], typed: str) -> None:
    found = find("my.jsonl", [row], {"prompt": None, **asked})[0].typed()
    assert found.startswith(typed) if typed.endswith("conve") else found == typed


def refused(rows: Sequence[dict[str, Any]], **asked: Any) -> str:
    with pytest.raises(UserError) as caught:
        find("my.jsonl", rows, asked)
    line = str(caught.value)
    assert line.startswith("my.jsonl: ") and "\n" not in line
    return line.removeprefix("my.jsonl: ")


@pytest.mark.parametrize(
    ("row", "choices"),
    [
        (
            {"prompt": "?", "response": "!", "answer": "!!"},
            "data=prompt_response, or data=prompt_response data.conversation.response=answer",
        ),
        (
            {"messages": CHAT, "conversations": SHAREGPT},
            "data=messages, or data=sharegpt",
        ),
        (
            {"messages": CHAT, "question": "How?", "answer": "So."},
            "data=messages, or data=prompt_response data.conversation.prompt=question "
            "data.conversation.response=answer",
        ),
        ({"prompt": "?", "response": "!", "text": "abc"}, "data=prompt_response, or data=text"),
        ({"input_ids": [1], "labels": [1], "text": "abc"}, "data=pretokenized, or data=text"),
    ],
)
def test_two_shapes_are_refused_with_both(row: dict[str, Any], choices: str) -> None:
    assert refused([row]) == (
        f"its rows have more than one shape (the columns are {', '.join(map(repr, row))}): set {choices}"
    )


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"a": "?", "b": "!"}, "set data.conversation.prompt=a data.conversation.response=b"),
        ({"body": "x"}, "set data=text data.conversation.column=body to learn all of it"),
        (
            {"chat": [{"speaker": "user", "said": "?"}]},
            "set data=messages data.conversation.column=chat data.conversation.role=speaker "
            "data.conversation.content=said, the keys of a message",
        ),
        (
            {"input_ids": [1, 2]},
            "token ids need a column 'labels', each the token's own id or -100, or a mask (loss_mask)",
        ),
        ({"x": [1, 2]}, "docs/data.md has the shapes, and how to add one"),
    ],
)
def test_no_shape_is_refused_with_the_nearest(row: dict[str, Any], advice: str) -> None:
    columns = ", ".join(map(repr, row))
    assert refused([row]) == f"no shape fits its rows (the columns are {columns}): {advice}"


def test_a_column_that_is_not_there_is_refused() -> None:
    assert refused([{"question": "?", "answer": "!"}], prompt="questoin") == (
        "no column 'questoin': the columns are 'question', 'answer': set data.conversation.prompt=question "
        "data.conversation.response=answer"
    )
    assert refused([]) == "it has no row that can be read"


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"chosen": CHAT, "rejected": CHAT}, "data=messages data.conversation.column=chosen"),
        ({"prompt": "?", "chosen": "!", "rejected": "-"}, "data=prompt_response data.conversation.response=chosen"),
        (
            {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
            "data=conversational data.conversation.response=chosen",
        ),
        ({"prompt": "?", "chosen": CHAT, "rejected": CHAT}, "data=messages data.conversation.column=chosen"),
    ],
)
def test_preferences_are_refused_with_what_they_are(row: dict[str, Any], advice: str) -> None:
    assert refused([row]) == (
        "preference rows, with a chosen and a rejected answer, of which supervised fine-tuning can learn the chosen "
        f"alone: set {advice} to train on those"
    )
    settings = dict(setting.removeprefix("data.conversation.").split("=") for setting in advice.split()[1:])
    assert find("my.jsonl", [row], settings)[0].typed().startswith(advice)


@pytest.mark.parametrize("label", [True, "false"])
@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"prompt": "?", "completion": "!"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
)
def test_labels_of_good_and_bad_are_refused(row: dict[str, Any], label: Any) -> None:
    assert refused([{**row, "label": label}]).startswith("preference rows, whose column 'label' says whether the answ")
    assert find("my.jsonl", [{**row, "label": 3}], {})


def test_a_label_of_something_else_is_a_column_like_others() -> None:
    assert find("my.jsonl", [{"text": "abc", "label": True}], {})[0].typed() == "data=text"


def examples() -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Each shape of the page: its heading, its name, and its lines."""
    page = PAGES[ROOT / "docs" / "data.md"]
    found = re.findall(r"^## ([^\n]+)\n\n`data=(\w+)`.*?```jsonl\n(.*?)```", page, re.S | re.M)
    return [(heading, name, [json.loads(line) for line in lines.splitlines()]) for heading, name, lines in found]


@pytest.mark.parametrize(("heading", "name", "rows"), examples(), ids=[name for _, name, _ in examples()])
def test_the_examples_of_the_page_are_found_as_it_says(heading: str, name: str, rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 3
    found, _ = find("my.jsonl", rows, {})
    assert found.typed() == f"data={name}"
    module, _, function = SHAPES[name].target.rpartition(".")
    made = [getattr(import_module(module), function)(row, **found.arguments) for row in rows]
    assert all(isinstance(each, Conversation) for each in made)


def test_the_page_has_every_shape_and_every_reason() -> None:
    assert {name for _, name, _ in examples()} == SHAPES.keys()
    sources = "".join(path.read_text() for path in (ROOT / "src" / "sft" / "data").glob("*.py"))
    raised = set(re.findall(r'(?:BadRow|Empty)\(\s*"(\w+)"', sources))
    assert len(raised) > 30
    explained = set(re.findall(r"`(\w+)`", PAGES[ROOT / "docs" / "data.md"].split("## Rows that are lost")[1]))
    assert raised - explained == set()
