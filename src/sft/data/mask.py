"""Conversation → `input_ids` and `labels`: THE MASK.

Each assistant turn i of a conversation is one term log Pr(y_i | x_i) of the objective, where

    x_i  is what a server would give the model: the chat template over the messages before turn i with its
         generation prompt, or the plain prompt with the special tokens that the tokenizer puts before a text;
    y_i  is what the model must then emit: the turn up to and including its stop token, and nothing after it.

y_i carries loss and x_i does not. The tokens of x_i are those of its text tokenized alone, as a server does. If a
token of the whole text would straddle the boundary, y_i is tokenized separately.

If x_{i+1} begins with [x_i, y_i], turn i + 1 continues the sample of turn i. Otherwise it begins a new sample, so a row
may give several (some templates rewrite history: Qwen3's drops earlier thinking). A turn with no message before it
answers nothing: it is context for the others; so is one of weight 0. `rendering` finds x_i and y_i.

If the template has {% generation %} marks, only marked tokens of y_i carry loss. The stop token is learned with the
rest of its turn, inside the marks or not.

Labels come from these spans, never from token ids, so a padding token may equal the stop token.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from sft.data.chat_template import REASONING, ChatTemplate, text_prefix
from sft.data.conversation import Conversation, Empty, Message
from sft.data.encoding import Encoder
from sft.data.labels import IGNORE, Ended, Sample, samples
from sft.data.outline import Outlines
from sft.data.rendering import Renderer, Rendering, turn_weights
from sft.errors import BadRow, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATED: Final = "truncated_prompt"  # the only reason that loses no sample
READ = frozenset({"role", "content", "tool_calls", REASONING[0]})  # keys of a message whose loss is noticed


@dataclass(frozen=True)
class Tokenized:
    """The samples of a row, and why any of them was lost or cut."""

    samples: list[Sample]
    reasons: Mapping[str, str] = field(default_factory=dict)  # reason → what exactly, "" where nothing is to add
    unread: frozenset[str] = frozenset()  # keys of messages that the chat template doesn't read
    stops: tuple[int, ...] = ()  # the token that ends each response


@dataclass(frozen=True, eq=False)
class Tokenization:
    """Conversation → samples of at most `max_length` tokens. Picklable, for worker processes.

    `supervise`: "response", or "all" for loss on every token but the first. `overlong`: a longer sample is
    lost ("drop", "error"), or loses the oldest tokens of its first prompt ("truncate_prompt"): never BOS, never part of
    a response; if that is not enough, the sample is lost. `train_on`: "all" turns of the assistant, or the "last".
    `special_text`: what the text of a special token in a message is, "as_text" or "as_tokens"; None: the row is lost
    (in plain text, it is tokens). `template`: arguments of the chat template.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    supervise: str = "response"
    overlong: str = "drop"
    train_on: str = "all"
    train_reasoning: bool = True
    train_tool_calls: bool = True
    special_text: str | None = None
    template: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.supervise in ("response", "all"), self.supervise
        assert self.overlong in ("drop", "truncate_prompt", "error"), self.overlong
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer: use a model with a tokenizer.json"
            )

    def __call__(self, conversation: Conversation | Empty | BadRow) -> Tokenized:
        return self.batch([conversation])[0]

    def batch(self, conversations: Sequence[Conversation | Empty | BadRow]) -> list[Tokenized]:
        """The samples of several rows, encoded together."""
        rows = [self._rendered(conversation) for conversation in conversations]
        texts = [text for row in rows for text in row.texts]
        encodings = iter(self._encoder.batch(texts))
        return [self._tokenized(row, [next(encodings) for _ in row.texts]) for row in rows]

    def _rendered(self, conversation: Conversation | Empty | BadRow) -> "_Row":
        """What is to be encoded of a row."""
        if isinstance(conversation, Empty):
            return _Row(reasons={conversation.reason: ""})
        if isinstance(conversation, BadRow):
            return _Row(reasons={conversation.reason: str(conversation)})
        try:
            if conversation.input_ids is not None:
                sample = self._own_tokens(conversation)
                return _Row(samples=[(sample, sample.labels[-1:] if sample.labels[-1:] != [IGNORE] else [])])
            if conversation.messages is None:
                return self._plain(conversation)
            return self._chat(conversation, conversation.messages)
        except BadRow as error:
            return _Row(reasons={error.reason: str(error)})

    def _tokenized(self, row: "_Row", encodings: list[list[int]]) -> Tokenized:
        reasons = dict(row.reasons)
        made = list(row.samples)
        try:
            if row.plain:
                sample = self._joined(*row.plain, *encodings)
                made.append((sample, sample.input_ids[-1:]))
            for rendering, encoding in zip(row.renderings, encodings, strict=not row.plain):
                made += samples(self._encoder, rendering, encoding)
        except BadRow as error:
            reasons.setdefault(error.reason, str(error))
        kept, stops = [], []
        for sample, ends in made:
            fitted, reason, why = self._fit(sample)
            if reason:
                reasons[reason] = why
            if fitted:
                kept.append(fitted)
                stops += ends
        return Tokenized(kept, reasons, row.unread, tuple(stop for stop in stops if stop != IGNORE))

    def _own_tokens(self, row: Conversation) -> Sample:
        """A row that was tokenized before."""
        assert row.input_ids is not None and row.labels is not None
        unknown = next((token for token in row.input_ids if not 0 <= token < self._num_tokens), None)
        if unknown is not None:
            raise BadRow("unknown_token", f"token {unknown} is none of the tokenizer's {self._num_tokens}")
        return Sample(row.input_ids, row.labels)

    def _plain(self, row: Conversation) -> "_Row":
        prompt, response = row.prompt, row.response
        if self.special_text == "as_text" and self._template.special_text.search(prompt + response):
            prompt, response = self._encoder.hidden(prompt), self._encoder.hidden(response)
            prompt_ids, response_ids = self._encoder.as_text(prompt)[0], self._encoder.as_text(response)[0]
            sample = self._with_ends(prompt_ids, response_ids)
            return _Row(samples=[(sample, sample.input_ids[-1:])])
        if self._surely_overlong(prompt + response):
            return _Row(reasons={"overlong": f"more than data.max_length={self.max_length} tokens"})
        return _Row(texts=[prompt, prompt + response], plain=(prompt, response))

    def _joined(self, prompt: str, response: str, prompt_ids: list[int], ids: list[int]) -> Sample:
        """Prompt and response, end to end."""
        if ids[: len(prompt_ids)] == prompt_ids:
            return self._with_ends(prompt_ids, ids[len(prompt_ids) :])
        return self._with_ends(*self._encoder.apart(prompt, response)[:2])

    def _with_ends(self, prompt_ids: list[int], response_ids: list[int]) -> Sample:
        """A sample with what the tokenizer puts before a text, and EOS behind it, unless the text has them already."""
        eos = self.tokenizer.eos_token_id
        if eos is None:
            raise UserError("the tokenizer has no EOS token to end a response with: set its eos_token")
        prefix = self._text_prefix
        if prefix and (prompt_ids + response_ids)[: len(prefix)] == prefix:
            prefix = []
        if response_ids[-1:] != [eos]:
            response_ids = [*response_ids, int(eos)]
        return Sample(prefix + prompt_ids + response_ids, [IGNORE] * len(prefix + prompt_ids) + response_ids)

    def _chat(self, row: Conversation, messages: list[Message]) -> "_Row":
        tools = row.tools
        found = self._special_text_in([*messages, {"tools": tools}])
        if found and self.special_text is None:
            raise BadRow(
                "special_text",
                f"the row holds {found!r}, which is a special token: set data.special_text=as_text, or as_tokens",
            )
        hide = found is not None and self.special_text == "as_text"
        if hide:
            messages, tools = self._hidden(messages), tools and self._hidden(tools)
        weights = turn_weights(row, self.train_on)
        renderings, reasons = self._renderer(messages, weights, tools, row.template)
        if not renderings and not reasons:
            answers = any(message["role"] == "assistant" for message in messages[1:])
            reasons = {"no_supervised_token": "no turn is to be learned"} if answers else {"empty_prompt": ""}
        keys = set().union(*messages) - READ | row.template.keys()
        unread = frozenset(key for key in keys if not self._template.reads(key))
        if hide:
            hidden = [sample for rendering in renderings for sample in samples(self._encoder, rendering, None)]
            return _Row(samples=hidden, reasons=reasons, unread=unread)
        sure = [rendering for rendering in renderings if not self._surely_overlong(rendering.text)]
        if len(sure) < len(renderings):
            reasons = {**reasons, "overlong": f"more than data.max_length={self.max_length} tokens"}
        texts = [rendering.text for rendering in sure]
        return _Row(texts=texts, renderings=sure, reasons=reasons, unread=unread)

    def _hidden(self, mappings: list[Message]) -> list[Message]:
        """Messages or tools with special tokens' text hidden."""
        change = self._encoder.hidden
        return [{key: _mapped(value, change) for key, value in mapping.items()} for mapping in mappings]

    def _special_text_in(self, messages: list[Message]) -> str | None:
        """The first special token whose text a message holds."""
        for message in messages:
            for key, value in message.items():
                if key != "role" and value:
                    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
                    if match := self._template.special_text.search(text):
                        return match[0]
        return None

    def _fit(self, sample: Sample) -> tuple[Sample | None, str | None, str]:
        """The sample with its final labels, cut to length; None where it is lost; the reason for either, and what
        exactly."""
        ids, weights = sample.input_ids, sample.weights
        labels = ids if self.supervise == "all" else sample.labels
        if labels and labels[0] != IGNORE:
            labels = [IGNORE, *labels[1:]]
        if self._bos in labels:  # which a server puts there, wherever it is
            labels = [IGNORE if label == self._bos else label for label in labels]
        if labels.count(IGNORE) == len(labels):
            return None, "no_supervised_token", ""
        if self.supervise == "all":
            weights = None
        excess = len(ids) - self.max_length
        if excess <= 0:
            return Sample(ids, labels, weights), None, ""
        num_context = next(i for i, label in enumerate(labels) if label != IGNORE)
        if self.overlong != "truncate_prompt" or num_context <= excess:  # a first response token needs one before it
            return None, "overlong", f"a sample of {len(ids)} tokens, and data.max_length={self.max_length}"
        begin = int(ids[0] == self.tokenizer.bos_token_id)
        end = begin + excess
        kept = weights and weights[:begin] + weights[end:]
        return Sample(ids[:begin] + ids[end:], labels[:begin] + labels[end:], kept), TRUNCATED, ""

    def _surely_overlong(self, text: str) -> bool:
        """Whether a text has too many tokens however it is encoded: a row of 50 MB isn't."""
        return self.overlong != "truncate_prompt" and len(text) > self._most_characters

    @cached_property
    def _most_characters(self) -> float:
        """That `max_length` tokens can have. Four times as many: a text may be normalised to a shorter one."""
        import tokenizers

        model = self.tokenizer.backend_tokenizer.model
        if not isinstance(model, tokenizers.models.BPE) or model.unk_token is not None:
            return float("inf")  # one unknown token may stand for any length
        return 4.0 * self.max_length * max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.template)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self._template, self.train_reasoning, self.train_tool_calls, Outlines(self._template))

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self._template.special_text)

    @cached_property
    def _num_tokens(self) -> int:
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def _bos(self) -> int | None:
        """BOS, unless it ends a text, too."""
        bos = self.tokenizer.bos_token_id
        return None if bos is None or bos == self.tokenizer.eos_token_id else int(bos)

    @cached_property
    def _text_prefix(self) -> list[int]:
        return text_prefix(self.tokenizer)


@dataclass(frozen=True)
class _Row:
    """A row between its rendering and its encoding."""

    texts: list[str] = field(default_factory=list)  # to be encoded
    renderings: list[Rendering] = field(default_factory=list)  # of a chat, one for each text
    plain: tuple[str, str] | None = None  # prompt and response, else
    samples: list[Ended] = field(default_factory=list)  # that need no encoding
    reasons: Mapping[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    return [_mapped(inner, change) for inner in value] if isinstance(value, list) else value
