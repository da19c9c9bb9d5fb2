"""Conversation → `input_ids` and `labels`: THE MASK.

Each assistant turn i of a conversation is one term log Pr(y_i | x_i) of the objective, where

    x_i  is what a server would give the model: the chat template over the messages before turn i with its
         generation prompt, or the plain prompt with the special tokens that the tokenizer puts before a text;
    y_i  is what the model must then emit: the turn up to and including its stop token, and nothing after it.

y_i carries loss and x_i does not. The tokens of x_i are those of its text tokenized alone, as a server does. If a
token of the whole text would straddle the boundary, y_i is tokenized separately.

If x_{i+1} begins with [x_i, y_i], token by token, turn i + 1 continues the sample of turn i. Otherwise it begins a
new sample, so a row may give several (some templates rewrite history: Qwen3's drops earlier thinking). A turn with no
message before it answers nothing: it is context for the others.

If the template has {% generation %} marks, only marked tokens of y_i carry loss. The stop token is learned with the
rest of its turn, inside the marks or not.

Labels come from these spans, never from token ids, so a padding token may equal the stop token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

from sft.data.chat_template import (
    NO_STOP,
    encode,
    generation_spans,
    render,
    special_ids,
    stop_token_id,
    text_prefix,
)
from sft.data.conversation import Conversation, Empty, Message, Tools
from sft.errors import BadRow, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that carries no loss
TRUNCATED: Final = "truncated_prompt"  # the only reason that loses no sample


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens, each with its label: the token itself, or IGNORE. Labels are not shifted: the model
    predicts `labels[t]` from `input_ids[:t]`, so the first label is always IGNORE."""

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None  # of each token's loss; None: all 1, as nearly always


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
    lost ("drop"), is a UserError ("error"), or loses the oldest tokens of its first prompt ("truncate_prompt"):
    never BOS, never part of a response; if that is not enough, the sample is lost.
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

    def batch(self, conversations: Sequence[Conversation | Empty | BadRow]) -> list[Tokenized]:
        """The samples of several rows, encoded together."""
        return [self(conversation) for conversation in conversations]

    def __call__(self, conversation: Conversation | Empty | BadRow) -> Tokenized:
        if isinstance(conversation, Empty | BadRow):
            return Tokenized([], {conversation.reason: str(conversation) if isinstance(conversation, BadRow) else ""})
        if conversation.messages is None:
            samples = [self._plain(conversation.prompt, conversation.response)]
        else:
            samples = self._chat(conversation.messages, conversation.tools)
        if not samples:  # the only assistant turn has no message before it
            return Tokenized([], {"empty_prompt": ""})
        fitted = [self._fit(sample) for sample in samples]
        return Tokenized(
            [sample for sample, _ in fitted if sample is not None],
            {reason: "" for _, reason in fitted if reason is not None},
        )

    def _plain(self, prompt: str, response: str) -> Sample:
        prompt_ids, response_ids, _ = self._split(prompt, prompt + response)
        prompt_ids = self._text_prefix + prompt_ids
        stop = stop_token_id(self.tokenizer, chat=False)
        if response_ids[-1:] != [stop]:  # some responses already end in it
            response_ids.append(stop)
        return Sample(prompt_ids + response_ids, [IGNORE] * len(prompt_ids) + response_ids)

    def _chat(self, messages: list[Message], tools: Tools) -> list[Sample]:
        samples: list[Sample] = []
        ids: list[int] = []
        labels: list[int] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant" or i == 0:
                continue
            prompt_ids, response_ids, response_labels = self._turn(messages, i, tools)
            if prompt_ids[: len(ids)] != ids:  # the template has rewritten history
                samples.append(Sample(ids, labels))
                ids, labels = [], []
            labels = labels + [IGNORE] * (len(prompt_ids) - len(ids)) + response_labels
            ids = prompt_ids + response_ids
        return [*samples, Sample(ids, labels)] if ids else []

    def _turn(self, messages: list[Message], i: int, tools: Tools) -> tuple[list[int], list[int], list[int]]:
        """The tokens of x_i, the tokens of y_i and the labels of y_i."""
        prompt = render(self.tokenizer, messages[:i], tools, add_generation_prompt=True)
        whole = render(self.tokenizer, messages[: i + 1], tools)
        if not whole.startswith(prompt):
            raise UserError(
                f"with this chat template the assistant's turn (message {i}) does not begin with the "
                f"generation prompt (which ends in {prompt[-40:]!r}), so the model would be trained on another text "
                "than it is served with: set model.chat_template to a template whose turns begin with it"
            )
        prompt_ids, rest, ends = self._split(prompt, whole)
        response = rest[: self._response_length(rest)]
        spans = generation_spans(self.tokenizer, messages[: i + 1], tools)
        if spans is None:
            return prompt_ids, response, response
        marked = [any(begin < end <= stop for begin, stop in spans) for end in ends[: len(response)]]
        marked[-1] = any(marked)
        labels = [t if is_marked else IGNORE for t, is_marked in zip(response, marked, strict=True)]
        return prompt_ids, response, labels

    def _split(self, prompt: str, whole: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens of `prompt`, the tokens of the rest of `whole`, and the character at which each of these ends."""
        prompt_ids = encode(self.tokenizer, prompt).ids
        num_prompt = len(prompt_ids)
        joint = encode(self.tokenizer, whole)
        # By ids, not offsets: those of a byte-level token may hide a leading space that straddles the boundary.
        if joint.ids[:num_prompt] == prompt_ids:
            return prompt_ids, joint.ids[num_prompt:], [end for _, end in joint.offsets[num_prompt:]]
        rest = encode(self.tokenizer, self._anchor + whole[len(prompt) :])
        num_anchor, shift = int(self._anchor != ""), len(prompt) - len(self._anchor)
        return prompt_ids, rest.ids[num_anchor:], [end + shift for _, end in rest.offsets[num_anchor:]]

    def _response_length(self, rest: list[int]) -> int:
        """The number of tokens up to and including the stop token, or, without one (a tool call may end differently),
        up to the last special token."""
        for ends in ({self._chat_stop}, self._special_ids):
            positions = [i for i, token in enumerate(rest) if token in ends]
            if positions:
                return positions[-1] + 1
        raise UserError(NO_STOP)

    def _fit(self, sample: Sample) -> tuple[Sample | None, str | None]:
        """The sample with its final labels, cut to length; None where it is lost; and the reason for either."""
        ids = sample.input_ids
        labels = [IGNORE, *(ids if self.supervise == "all" else sample.labels)[1:]]
        num_context = next((i for i, label in enumerate(labels) if label != IGNORE), 0)
        if not num_context:
            return None, "no_supervised_token"
        excess = len(ids) - self.max_length
        if excess <= 0:
            return Sample(ids, labels), None
        if self.overlong == "error":
            raise UserError(
                f"a sample of {len(ids)} tokens does not fit data.max_length={self.max_length}: raise it, or "
                "set data.overlong to drop or truncate_prompt"
            )
        if self.overlong == "drop" or num_context <= excess:  # the first response token needs one before it
            return None, "overlong"
        begin = int(ids[0] == self.tokenizer.bos_token_id)
        end = begin + excess
        return Sample(ids[:begin] + ids[end:], labels[:begin] + labels[end:]), TRUNCATED

    @cached_property
    def _chat_stop(self) -> int:
        return stop_token_id(self.tokenizer, chat=True)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def _text_prefix(self) -> list[int]:
        return text_prefix(self.tokenizer)

    @cached_property
    def _anchor(self) -> str:
        """A special token to put before a continuation that is tokenized separately, because some tokenizers begin a
        text with a space; not one that swallows the space after it (`rstrip`)."""
        added = self.tokenizer.added_tokens_decoder.values()
        return next((token.content for token in added if token.special and not token.rstrip), "")
