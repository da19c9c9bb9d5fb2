"""Conversation → `input_ids` and `labels`: THE MASK.

Each assistant turn i of a conversation is one term log Pr(y_i | x_i) of the objective, where

    x_i  is what a server would give the model: the chat template over the messages before turn i with its
         generation prompt, or the plain prompt with the special tokens that the tokenizer puts before a text;
    y_i  is what the model must then emit: the turn up to and including its stop token, and nothing after it.

y_i carries loss and x_i does not. The tokens of x_i are those of its text tokenized alone, as it is served;
where a token of the whole text would straddle the boundary, y_i is tokenized apart.

Turn i + 1 continues the sequence of turn i where x_{i+1} begins with [x_i, y_i], token by token. Where it
does not (a template that rewrites history, as Qwen3's drops earlier thinking) it begins a sample of its own,
so a row may give several. A turn with no message before it answers nothing: it is context for the others.

Where the template has {% generation %} marks, they are its author's word on what is learned within y_i. The
stop token is learned with the rest of its turn, inside the marks or not.

Labels come from these spans, never from token ids, so a padding token equal to the stop token does no harm.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from sft.data.chat_template import (
    NO_STOP,
    Tools,
    encode,
    generation_spans,
    render,
    special_ids,
    stop_token_id,
    text_prefix,
)
from sft.data.conversation import Conversation, Empty, Message
from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label of a token that carries no loss
TRUNCATED = "truncated_prompt"  # of the reasons, the one that loses no sample


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens, and for each its label: itself, or IGNORE. Labels are not shifted: `labels[t]`
    is what is predicted from `input_ids[:t]`, so the first is always IGNORE."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Tokenized:
    """What became of a row: its samples, and why any of them was lost or cut."""

    samples: list[Sample]
    reasons: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Tokenization:
    """Conversation → samples of at most `max_length` tokens. Picklable, for worker processes.

    `supervise`: "response", or "all" for loss on every token but the first. `overlong`: a longer sample is
    lost ("drop"), is a UserError ("error"), or gives up the oldest tokens of its first prompt
    ("truncate_prompt"): never BOS, never part of a response, and where that is not enough the sample is lost.
    """

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    supervise: str = "response"
    overlong: str = "drop"

    def __post_init__(self) -> None:
        assert self.supervise in ("response", "all"), self.supervise
        assert self.overlong in ("drop", "truncate_prompt", "error"), self.overlong
        if not self.tokenizer.is_fast:
            raise UserError(
                f"{type(self.tokenizer).__name__} is not a fast tokenizer: use a model with a tokenizer.json"
            )

    def __call__(self, conversation: Conversation | Empty) -> Tokenized:
        if isinstance(conversation, Empty):
            return Tokenized([], frozenset({conversation.reason}))
        if conversation.messages is None:
            samples = [self._plain(conversation.prompt, conversation.response)]
        else:
            samples = self._chat(conversation.messages, conversation.tools)
        if not samples:  # the one assistant turn there is has no message before it
            return Tokenized([], frozenset({"empty_prompt"}))
        fitted = [self._fit(sample) for sample in samples]
        return Tokenized(
            [sample for sample, _ in fitted if sample is not None],
            frozenset(reason for _, reason in fitted if reason is not None),
        )

    def _plain(self, prompt: str, response: str) -> Sample:
        prompt_ids, response_ids, _ = self._split(prompt, prompt + response)
        prompt_ids = self._text_prefix + prompt_ids
        stop = stop_token_id(self.tokenizer, chat=False)
        if response_ids[-1:] != [stop]:  # some data brings its own
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
            if prompt_ids[: len(ids)] != ids:  # history rewritten
                samples.append(Sample(ids, labels))
                ids, labels = [], []
            labels = labels + [IGNORE] * (len(prompt_ids) - len(ids)) + response_labels
            ids = prompt_ids + response_ids
        return [*samples, Sample(ids, labels)] if ids else []

    def _turn(self, messages: list[Message], i: int, tools: Tools) -> tuple[list[int], list[int], list[int]]:
        """Tokens of x_i, tokens of y_i, labels of y_i."""
        prompt = render(self.tokenizer, messages[:i], tools, add_generation_prompt=True)
        whole = render(self.tokenizer, messages[: i + 1], tools)
        if not whole.startswith(prompt):
            raise UserError(
                f"with this chat template the assistant's turn (message {i}) does not begin with the "
                f"generation prompt (which ends in {prompt[-40:]!r}), so what is trained would not be what "
                "is served: give a template in which it does in model.chat_template"
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
        """Tokens of `prompt`, tokens of the rest of `whole`, and the characters these end at."""
        prompt_ids = encode(self.tokenizer, prompt).ids
        num_prompt = len(prompt_ids)
        joint = encode(self.tokenizer, whole)
        # By ids, not offsets, for those of a byte-level token may hide the leading space that straddles.
        if joint.ids[:num_prompt] == prompt_ids:
            return prompt_ids, joint.ids[num_prompt:], [end for _, end in joint.offsets[num_prompt:]]
        apart = encode(self.tokenizer, self._anchor + whole[len(prompt) :])
        num_anchor, shift = int(self._anchor != ""), len(prompt) - len(self._anchor)
        return prompt_ids, apart.ids[num_anchor:], [end + shift for _, end in apart.offsets[num_anchor:]]

    def _response_length(self, rest: list[int]) -> int:
        """Tokens up to and including the stop token; without one (a call of tools may end otherwise) up to
        the last special token."""
        for wanted in ({self._chat_stop}, self._special_ids):
            found = [i for i, token in enumerate(rest) if token in wanted]
            if found:
                return found[-1] + 1
        raise UserError(NO_STOP)

    def _fit(self, sample: Sample) -> tuple[Sample | None, str | None]:
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
        if self.overlong == "drop" or num_context <= excess:  # the first response token needs one to follow
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
        """A special token to tokenize a continuation behind, since some tokenizers begin a text with a space;
        not one that swallows the space after it (`rstrip`)."""
        added = self.tokenizer.added_tokens_decoder.values()
        return next((token.content for token in added if token.special and not token.rstrip), "")
