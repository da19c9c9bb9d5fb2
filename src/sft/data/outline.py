"""The outline of a conversation: how the template renders every conversation of the same form.

A template is a program over roles, over which keys a message has, and over its texts; at these it can hardly look but
to find them empty or to search them for words that the template itself contains. So conversations that are alike in all
of that are rendered alike. Once one of them has been rendered turn by turn, with stand-ins for its texts, a further one
takes a single rendering: it must be what the outline says, or the outline isn't used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sft.data.chat_template import REASONING, ChatTemplate
from sft.data.conversation import Message, Tools
from sft.data.pieces import is_all_thought
from sft.errors import BadRow

MOST = 4096  # forms that are remembered
TEXTS = ("content", REASONING[0])
# The whitespace around a stand-in shows whether the template strips a text.
STAND_IN = "\n qj{:05d}xv \n"
STAND_INS = re.compile(r"(\n )?qj(\d{5})xv( \n)?")
SEARCHES = (
    *("startswith", "endswith", "find", "rfind", "index", "count", "split", "rsplit", "partition", "rpartition"),
    *("replace", "removeprefix", "removesuffix", "strip", "lstrip", "rstrip"),
)


@dataclass(frozen=True)
class Outline:
    """What the template writes, with slots for the texts: literals[0], slots[0], literals[1], ..."""

    literals: list[str]
    slots: list[tuple[int, str, bool, bool]]  # message, key, whether whitespace stays before and behind the text
    spans: dict[int, tuple[tuple[int, int], tuple[int, int]]]  # turn → (literal, place in it) of its begin and its end

    def fill(self, messages: Sequence[Message]) -> tuple[str, dict[int, tuple[int, int]]]:
        """The text, and where each turn of the assistant begins and ends in it."""
        parts, starts, length = [], [], 0
        for literal, (number, key, before, behind) in zip(self.literals, self.slots, strict=False):
            text = str(messages[number][key])
            text = text if before else text.lstrip()
            text = text if behind else text.rstrip()
            starts.append(length)
            parts += [literal, text]
            length += len(literal) + len(text)
        starts.append(length)
        parts.append(self.literals[-1])
        spans = {
            turn: (starts[begin[0]] + begin[1], starts[end[0]] + end[1]) for turn, (begin, end) in self.spans.items()
        }
        return "".join(parts), spans


@dataclass(frozen=True, eq=False)
class Outlines:
    """The outlines of conversations seen before. Those of a kind that can't have one are None."""

    template: ChatTemplate
    known: dict[object, Outline | None] = field(default_factory=dict)
    seen: set[object] = field(default_factory=set)  # forms of one conversation so far, of which no outline was made

    def find(self, messages: Sequence[Message], tools: Tools, arguments: Mapping[str, object]) -> Outline | None:
        """The outline of a conversation from the second of its form on; None without one."""
        form = self._form(messages, tools, arguments)
        if form is None:
            return None
        for forms in (self.known, self.seen):
            if len(forms) == MOST:
                forms.clear()
        if form not in self.known and form not in self.seen:
            self.seen.add(form)
        elif form not in self.known:
            self.seen.discard(form)
            self.known[form] = self._made(messages, tools, arguments)
        return self.known.get(form)

    def _form(self, messages: Sequence[Message], tools: Tools, arguments: Mapping[str, object]) -> object:
        """All that decides how a conversation is rendered, but its texts; None where these might."""
        if self.template.is_marked or self.template.ends_with_next:
            return None
        form: list[object] = []
        for message in messages:
            if "tool_calls" in message:
                return None
            part: list[object] = []
            for key, value in message.items():
                if key not in TEXTS:
                    if self.template.reads(key):
                        part.append((key, repr(value)))
                    continue
                text = str(value)
                if not text.strip():
                    part.append((key, text))
                elif text in self._words or self._searched.search(text):
                    return None
                else:
                    part.append(key)
            form.append(tuple(part))
        return tuple(form), repr(tools) if tools else "", repr(arguments) if arguments else ""

    def _made(self, messages: Sequence[Message], tools: Tools, arguments: Mapping[str, object]) -> Outline | None:
        """An outline, if the template renders each turn of the whole as a server would have."""
        texts = [(i, key) for i, message in enumerate(messages) for key in TEXTS if str(message.get(key) or "").strip()]
        stand_ins = [dict(message) for message in messages]
        for number, (i, key) in enumerate(texts):
            stand_ins[i][key] = STAND_IN.format(number)
        try:
            whole = self.template.render(stand_ins, tools, arguments=arguments)
            slots = list(STAND_INS.finditer(whole))
            spans = {}
            for i, message in enumerate(stand_ins):
                if message["role"] != "assistant" or i == 0:
                    continue
                prompt = self.template.render(stand_ins[:i], tools, add_generation_prompt=True, arguments=arguments)
                until = self.template.render(stand_ins[: i + 1], tools, arguments=arguments)
                end = len(prompt) + self.template.end_of_turn(until[len(prompt) :])
                if not (until.startswith(prompt) and whole.startswith(until[:end])):
                    return None
                if is_all_thought(prompt, until[len(prompt) : end]):
                    return None
                told = {texts[int(slot[2])] for slot in slots if len(prompt) <= slot.start() and slot.end() <= end}
                if told != {(i, key) for at, key in texts if at == i}:
                    return None
                spans[i] = _place(len(prompt), slots), _place(end, slots)
        except BadRow:
            return None
        borders = [0, *(border for slot in slots for border in slot.span()), len(whole)]
        literals = [whole[begin:end] for begin, end in zip(borders[::2], borders[1::2], strict=True)]
        kept = [(*texts[int(slot[2])], bool(slot[1]), bool(slot[3])) for slot in slots]
        return Outline(literals, kept, spans)

    @cached_property
    def _searched(self) -> re.Pattern[str]:
        """Finds in a text what the template may search it for, and special tokens."""
        words = sorted({word for word in _searched_for(self.template.source) if word.strip()}, key=len, reverse=True)
        return re.compile("|".join([*map(re.escape, words), self.template.special_text.pattern]))

    @cached_property
    def _words(self) -> frozenset[str]:
        """Texts that the template may compare a text with."""
        quoted = re.findall(r"'([^']*)'|\"([^\"]*)\"", self.template.source)
        return frozenset(single or double for single, double in quoted)


def _place(position: int, slots: Sequence[re.Match[str]]) -> tuple[int, int]:
    """(literal, place in it) of a position in the text with the stand-ins."""
    before = [slot for slot in slots if slot.end() <= position]
    return len(before), position - (before[-1].end() if before else 0)


def _searched_for(source: str) -> Iterator[str]:
    """The constants of a template that it may search a text for, strip from it, or replace in it."""
    from jinja2 import Environment, nodes

    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
        re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", source)
    )

    def constants(node: nodes.Node | None) -> Iterator[str]:
        if isinstance(node, nodes.Const) and isinstance(node.value, str):
            yield node.value
        elif node is not None:
            for const in node.find_all(nodes.Const):
                if isinstance(const.value, str):
                    yield const.value

    for compare in tree.find_all(nodes.Compare):
        if any(operand.op in ("in", "notin") for operand in compare.ops):
            yield from constants(compare.expr)
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Getattr) and call.node.attr in SEARCHES:
            for argument in call.args:
                yield from constants(argument)
    for filtered in tree.find_all(nodes.Filter):
        for argument in filtered.args if filtered.name in ("replace", "split", "trim") else ():
            yield from constants(argument)
    for test in tree.find_all(nodes.Test):
        if test.name == "in":
            yield from constants(test.node)
    for assigned in tree.find_all(nodes.Assign):
        if isinstance(assigned.node, nodes.Const):
            yield from constants(assigned.node)
