"""Chat template and tokenizer: the text of a conversation, its tokens, and the token that ends a turn."""

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sft.data.bounded import Endless, bounded
from sft.data.clock import pinned
from sft.data.conversation import Message, Tools
from sft.errors import BadRow, UserError

if TYPE_CHECKING:  # a second to import, which `sft --help` need not pay
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

NO_STOP = (
    "the chat template does not end an assistant turn with a special token, so the model would never learn "
    "to stop: set model.chat_template to one that does"
)
REASONING = ("reasoning_content", "reasoning", "thinking")  # what templates call it; the first is ours
PROBE = "sentinel"
SECONDS = 10.0  # for one conversation, which takes a thousandth of one
LONGEST = 10_000_000  # characters that a template may make of a short conversation


class Unending(UserError):
    """A chat template that runs for ever, or nearly: it would do so for each row."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: it is stopped: correct it, or set model.chat_template to another")
        self.what = what

    def __reduce__(self) -> tuple[type["Unending"], tuple[str]]:  # from a worker process
        return Unending, (self.what,)


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A tokenizer's chat template with the arguments that it is always rendered with (`model.template`). Picklable."""

    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, object] = field(default_factory=dict)
    _known: dict[str, str] = field(default_factory=dict, repr=False)  # template → with its clock pinned
    _tails: dict[bool, str] = field(default_factory=dict, repr=False)

    def render(
        self,
        messages: list[Message],
        tools: Tools = None,
        add_generation_prompt: bool = False,
        arguments: Mapping[str, object] | None = None,
    ) -> str:
        """The text of the messages; `arguments` are the row's own. BadRow if the template refuses them."""
        try:
            return self._rendered(
                self._in_its_words(messages), tools, arguments, add_generation_prompt=add_generation_prompt
            )[0][0]
        except Unending:
            raise
        except Exception as error:  # a template is a program: it may raise anything
            if not self.source:
                raise UserError(
                    "the tokenizer has no chat template: set model.chat_template=FILE, or "
                    "data.conversation.chat=false for plain prompt and response"
                ) from error
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow("template_refuses", f"the chat template refuses these messages: {reason}") from error

    def generation_spans(
        self, messages: list[Message], tools: Tools, arguments: Mapping[str, object] | None = None
    ) -> list[tuple[int, int]] | None:
        """The template's {% generation %} blocks, in characters of the text; None if it has none.

        Not by `apply_chat_template(return_assistant_tokens_mask=True)`: with trimmed offsets that drops a span whose
        first token is a space, and every span after it.
        """
        if not self.is_marked:
            return None
        return list(
            self._rendered(self._in_its_words(messages), tools, arguments, return_assistant_tokens_mask=True)[1][0]
        )

    def reads(self, name: str) -> bool:
        """Whether the template names a key of a message, or an argument."""
        return name in self._words

    @cached_property
    def source(self) -> str:
        template: object = self.tokenizer.chat_template  # some tokenizers have several, by name
        return "\n".join(template.values()) if isinstance(template, dict) else str(template or "")

    @cached_property
    def _words(self) -> frozenset[str]:
        return frozenset(re.findall(r"\w+", self.source))

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        """Finds the text of special tokens."""
        ids = special_ids(self.tokenizer)
        tokens = sorted(filter(None, self.tokenizer.convert_ids_to_tokens(sorted(ids))), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    @cached_property
    def stop(self) -> str:
        """The special token that ends a reply, at which a server stops.

        It is the first after the reply, with which the next turn may begin (as GLM's does); or EOS, where the template
        writes EOS right behind that one in every turn (as Cohere's does), and not behind the last turn alone (as Phi's
        does). UserError if there is none.
        """
        last, in_history = self._ends
        if not (last or in_history) or (not last and in_history[0] in self._opening):
            raise UserError(NO_STOP)
        first, *others = last or in_history[:1]
        eos = str(self.tokenizer.eos_token or "")
        return eos if eos in others and eos in in_history else first

    @property
    def ends_with_next(self) -> bool:
        """Whether what ends a turn is what the next begins with."""
        return not self._ends[0]

    def tail(self, calls: bool) -> str:
        """What is to be put behind a turn for its end: nothing, or, where the next turn's first token ends it, what
        stands before that and itself. A turn with calls is followed by their results."""
        if not self.ends_with_next:
            return ""
        if calls not in self._tails:
            self._tails[calls] = self._tail(calls)
        return self._tails[calls]

    def end_of_turn(self, response: str) -> int:
        """Where a turn ends, in characters: with the stop token, or, without one (a tool call may end differently),
        with the last special token. BadRow without any."""
        found = response.rfind(self.stop)
        if found >= 0:
            return found + len(self.stop)
        ends = [match.end() for match in self.special_text.finditer(response)]
        if not ends:
            raise BadRow("no_stop_token", NO_STOP)
        return ends[-1]

    @cached_property
    def is_marked(self) -> bool:
        return re.search(r"{%-?\s*generation\s*-?%}", self.source) is not None

    def _rendered(
        self, messages: list[Message], tools: Tools, arguments: Mapping[str, object] | None, **options: bool
    ) -> tuple[list[str], list[list[tuple[int, int]]]]:
        """The text, and its {% generation %} blocks. What `apply_chat_template` calls, without its checks of messages
        that may be anything."""
        from transformers.utils import chat_template_utils

        given = {**self._arguments, **arguments} if arguments else self._arguments
        rendered: Any = partial(  # type: ignore[explicit-any]
            chat_template_utils.render_jinja_template,
            [messages],
            tools=tools,  # type: ignore[arg-type]  # lists and mappings are invariant
            chat_template=self._pinned(tools),
            **options,  # type: ignore[arg-type]
            **given,  # type: ignore[arg-type]
        )
        try:
            texts, spans = bounded(SECONDS, rendered)
        except Endless:
            raise Unending(f"{self._name} takes more than {SECONDS:.0f} s for one conversation") from None
        except MemoryError:
            raise Unending(f"{self._name} takes more memory for one conversation than there is") from None
        if len(texts[0]) > LONGEST and len(texts[0]) > 100 * len(repr((messages, tools, given))):
            raise Unending(f"{self._name} makes {len(texts[0]):,} characters of one conversation")
        return texts, spans

    @property
    def _name(self) -> str:
        return f"the chat template (model.chat_template, or that of {self.tokenizer.name_or_path})"

    def _pinned(self, tools: Tools) -> str:
        """The template for a conversation with or without tools; its clock stands still."""
        template = self.tokenizer.get_chat_template(tools=tools)
        if template not in self._known:
            if _has_power(template):
                raise Unending(f"{self._name} raises a number to a power, which can take for ever")
            self._known[template], _ = pinned(template, self.arguments)
        return self._known[template]

    @cached_property
    def _opening(self) -> list[str]:
        """The special tokens of the generation prompt, which end no turn."""
        asked: list[Message] = [{"role": "user", "content": "x"}]
        text, prompted = self.render(asked), self.render(asked, add_generation_prompt=True)
        return self.special_text.findall(prompted.removeprefix(text))

    def _tail(self, calls: bool) -> str:
        call = {"type": "function", "function": {"name": PROBE, "arguments": {}}}
        turn: Message = {"role": "assistant", "content": PROBE, **({"tool_calls": [call]} if calls else {})}
        asked: Message = {"role": "user", "content": "x"}
        turns = [asked, turn]
        text, longer = self.render(turns), self.render([*turns, {"role": "tool", "content": "x"} if calls else asked])
        stop = self.special_text.search(longer, len(text))
        return longer[len(text) : stop.end()] if stop and longer.startswith(text) else ""

    @cached_property
    def _ends(self) -> tuple[list[str], list[str]]:
        """The special tokens behind a reply: where it is the last turn, and where a question follows."""
        reply: Message = {"role": "assistant", "content": PROBE}
        asked: Message = {"role": "user", "content": "x"}
        return _specials(self, [asked, reply]), _specials(self, [asked, reply, asked])

    @cached_property
    def _arguments(self) -> dict[str, object]:
        """Given to every rendering."""
        return {**self.tokenizer.special_tokens_map, **pinned("", self.arguments)[1]}

    @cached_property
    def _reasoning(self) -> list[str]:
        return [name for name in REASONING[1:] if self.reads(name)]

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads no text of a message but that of its parts."""
        for content, answer in ((PROBE, False), ([{"type": "text", "text": PROBE}], True)):
            try:
                [text], _ = self._rendered([{"role": "user", "content": content}], None, None)
            except Unending:
                raise
            except Exception:  # see `render`
                continue
            if PROBE in text:
                return answer
        return False

    def _in_its_words(self, messages: list[Message]) -> list[Message]:
        """The messages with the names and types that this template reads."""
        if self._reasoning:
            names = self._reasoning
            messages = [
                {**message, **dict.fromkeys(names, message[REASONING[0]])} if REASONING[0] in message else message
                for message in messages
            ]
        if self._wants_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}
                for message in messages
            ]
        return messages


def _has_power(template: str) -> bool:
    """Whether a template has the operator **, which nothing can stop while it computes."""
    from jinja2 import Environment, TemplateError

    with suppress(TemplateError):  # whoever renders it says what is wrong
        words = [word for _, kind, word in Environment().lex(template) if kind != "whitespace"]
        return any(word == "**" and before not in ("(", ",") for before, word in pairwise(words))
    return False


def _specials(template: ChatTemplate, messages: list[Message]) -> list[str]:
    """The special tokens right behind the first reply of a probe, one behind the other."""
    _, found, rest = template.render(messages).rpartition(PROBE)
    if not found:
        raise BadRow("content_not_rendered", "the chat template leaves out the text of replies")
    first = template.special_text.search(rest)
    specials = []
    while first:
        specials.append(first[0])
        first = template.special_text.match(rest, first.end())
    return specials


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = False) -> "Encoding":
    """Tokens of the text. By default none are added: a chat template writes its own BOS."""
    return backend(tokenizer).encode(text, add_special_tokens=add_special_tokens)


def backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer":
    """The tokenizer itself, without what earlier calls or its own file may have set: it neither cuts nor pads."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    if backend.truncation:
        backend.no_truncation()
    if backend.padding:
        backend.no_padding()
    return backend


def text_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts before a text, usually BOS; those after it have no place in a prompt."""
    bare = encode(tokenizer, "x").ids
    whole: list[int] = encode(tokenizer, "x", add_special_tokens=True).ids
    return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    named = frozenset(token_id for token_id in tokenizer.all_special_ids if token_id is not None)
    return named | {token_id for token_id, token in added if token.special}
