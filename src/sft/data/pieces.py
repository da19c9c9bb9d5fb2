"""Conservation: each piece that a message brings (reasoning, text, calls) is in what is rendered for it."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from sft.data.chat_template import REASONING, ChatTemplate
from sft.data.conversation import Message
from sft.errors import BadRow

# What begins a thought and what ends it, beside <think> and </think>.
THOUGHTS = {"<|START_THINKING|>": "<|END_THINKING|>", "<|channel>thought\n": "<channel|>", "[THINK]": "[/THINK]"}
OPENING = "|".join([r"<(?:\w+:)?think(?::\w+)?>", *map(re.escape, THOUGHTS)])
CLOSING = "|".join([r"</(?:\w+:)?think(?::\w+)?>", *map(re.escape, THOUGHTS.values())])
# How a prompt ends that has begun the thought, and perhaps ended it, so that the answer follows.
PROMPTED = re.compile(rf"(?P<opening>{OPENING})(?P<space>\s*)(?P<closing>(?:{CLOSING})\s*)?\Z")
# How a turn begins that has a thought, an empty one or half of one.
THOUGHT = re.compile(rf"\s*(?:(?:{OPENING}).*?(?:{CLOSING})|{OPENING}|{CLOSING})?\s*", re.DOTALL)
THOUGHT_AND_ANSWER = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
SHORT = 8  # characters: a text that may stand in a call's words by chance
STAND_IN = "Qx7jZ0vKw"
FADED = "\0"  # in place of what was found


@dataclass(frozen=True)
class Piece:
    """Where a piece is in a response, in characters."""

    kind: str  # reasoning | content | call
    begin: int
    end: int


def is_all_thought(prompt: str, response: str) -> bool:
    """Whether a response, behind a prompt that begins the thought, never ends it."""
    prompted = PROMPTED.search(prompt)
    return prompted is not None and not prompted["closing"] and not re.search(CLOSING, response)


def thought_and_answer(message: Message) -> tuple[str, str]:
    """A message's reasoning, be it a key of its own or in its text between <think> and </think>, and its text."""
    reasoning, content = str(message.get(REASONING[0]) or "").strip(), str(message.get("content") or "").strip()
    if not reasoning and (match := THOUGHT_AND_ANSWER.match(content)):
        return match[1].strip(), match[2].strip()
    return reasoning, content


def locate(
    template: ChatTemplate,
    message: Message,
    response: str,
    keep_reasoning: bool,
    keep_calls: bool,
    renders: Callable[[str], bool],
    think: str | None,
) -> list[Piece]:
    """The pieces in a response, in their order there. BadRow where one isn't there that is to be learned.

    `renders`: whether the template renders a text that stands in for the message's. `think`: what makes it think.
    """
    stop = response.rfind(template.stop)
    left = response[:stop] if stop >= 0 else response
    reasoning, content = thought_and_answer(message)
    whole = str(message.get("content") or "").strip()
    if whole in left and keep_reasoning:  # with a thought in it that the template leaves there
        reasoning, content = str(message.get(REASONING[0]) or "").strip(), whole
    calls = message.get("tool_calls") or []
    pieces = []
    for kind, text in sorted((("reasoning", reasoning), ("content", content)), key=lambda piece: -len(piece[1])):
        if not text:
            continue
        begin = left.find(text)
        if begin >= 0 and kind == "content" and len(text) < SHORT and left.strip() != text and not renders(STAND_IN):
            begin = -1
        if begin >= 0:
            pieces.append(Piece(kind, begin, begin + len(text)))
            left = left[:begin] + FADED * len(text) + left[begin + len(text) :]
        elif kind == "content":
            raise BadRow("content_not_rendered", f"the chat template leaves out the text {_short(text)}")
        elif keep_reasoning:
            raise BadRow(
                "reasoning_not_rendered",
                f"the chat template leaves out the reasoning {_short(text)}: "
                + (think or "set model.chat_template to one that renders it")
                + ", or data.train_reasoning=false to train without it",
            )
    assert isinstance(calls, list)
    found = [spot for call in calls for spot in _call_spots(call, left, keep_calls)]
    if found:
        pieces.append(Piece("call", min(begin for begin, _ in found), max(end for _, end in found)))
    return sorted(pieces, key=lambda piece: piece.begin)


def untrained(
    template: ChatTemplate, pieces: list[Piece], response: str, keep_reasoning: bool, keep_calls: bool
) -> tuple[tuple[int, int], ...]:
    """The stretches of a response that carry no loss, in characters; the whole of it if only its stop token would.

    What opens a piece belongs to it, and so does what closes a thought, up to its first special token or tag.
    """
    off = {kind for kind, keep in (("reasoning", keep_reasoning), ("call", keep_calls)) if not keep}
    if not off & {piece.kind for piece in pieces}:
        return ()
    if {piece.kind for piece in pieces} <= off:
        return ((0, len(response)),)
    spans = []
    for i, piece in enumerate(pieces):
        begin = _opening(template, pieces[i - 1], piece, response) if i else 0
        if i + 1 < len(pieces):
            end = _opening(template, piece, pieces[i + 1], response)
        else:
            stops = [match.start() for match in template.special_text.finditer(response)]
            end = stops[-1] if stops else len(response)
        if piece.kind in off:
            spans.append((begin, end))
    return tuple(spans)


def _opening(template: ChatTemplate, before: Piece, piece: Piece, response: str) -> int:
    """Where what opens a piece begins."""
    between = response[before.end : piece.begin]
    if before.kind != "reasoning":
        return before.end
    closing = re.compile(rf"</\w+>|{template.special_text.pattern}").search(between)
    end = before.end + (closing.end() if closing else 0)
    return end + len(response[end : piece.begin]) - len(response[end : piece.begin].lstrip())


def _call_spots(call: Mapping[str, object], response: str, keep: bool) -> Iterator[tuple[int, int]]:
    """Where a call's name and each of its arguments' names and values are."""
    function = call["function"]
    assert isinstance(function, Mapping)
    for value in (function["name"], *_leaves(function["arguments"])):
        spot = next((spot for text in _spellings(value) if (spot := response.find(text)) >= 0), None)
        if spot is not None:
            yield spot, spot + len(next(text for text in _spellings(value) if response.startswith(text, spot)))
        elif keep:
            raise BadRow(
                "tool_call_not_rendered",
                f"the chat template leaves out {_short(str(value))} of the call of {function['name']}: set "
                "model.chat_template to one that renders calls, or data.train_tool_calls=false",
            )


def _leaves(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _spellings(value: object) -> list[str]:
    """How templates write a value: as JSON, as Python, or a text as it is."""
    if isinstance(value, str):
        texts = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (False, True)]
        return [value, *texts, repr(value)[1:-1], value.strip()]
    return [json.dumps(value, default=str), str(value), str(value).lower()]


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
