"""Text → tokens, on either side of the border between prompt and response.

The tokens of a prompt are those of its text alone, as a server encodes it. What stands between two special tokens is
encoded by itself, whatever is around it; so it takes only the stretch from the last special token to the border to find
out where in the tokens of the whole text the border is.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sft.data.chat_template import backend, special_ids
from sft.errors import BadRow

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SHORT = 200  # characters of a stretch whose tokens are remembered
MOST = 1000  # such stretches
STAND_INS = 0xE000  # the first of the characters that stand in for special tokens' text
ANCHORS = ("\n", ".", "x")  # texts to put before a continuation


@dataclass(frozen=True, eq=False)
class Encoder:
    """A tokenizer, and a pattern that finds the text of its special tokens. Adds no special tokens by itself."""

    tokenizer: "PreTrainedTokenizerBase"
    special_text: re.Pattern[str]
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False) if texts else []
        return [encoding.ids for encoding in encodings]

    def ends(self, text: str) -> list[int]:
        """Where in the text each of its tokens ends."""
        return [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]

    def ids(self, text: str) -> list[int]:
        if len(text) > SHORT:
            return self._backend.encode(text, add_special_tokens=False).ids
        if text not in self._known:
            if len(self._known) == MOST:
                self._known.clear()
            self._known[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._known[text]

    def borders(
        self, text: str, ids: list[int], spans: Sequence[tuple[int, int]]
    ) -> "Iterator[tuple[int, int] | None]":
        """For each response in a text (begin, end; the end is that of a special token) the numbers of tokens before its
        begin and its end. None where a token straddles its begin, or where the text before it, encoded alone, has other
        tokens than there."""
        begins, numbers, after = self._special(text, ids)
        for begin, end in spans:
            place = bisect_right(begins, begin - 1)
            opening, first = (begins[place - 1], numbers[place - 1]) if place else (0, 0)
            alone = self.ids(text[opening:begin])
            border = first + len(alone)
            yield (border, after[end]) if end in after and ids[first:border] == alone else None

    def _special(self, text: str, ids: list[int]) -> tuple[list[int], list[int], dict[int, int]]:
        """The special tokens of a text: where in it each begins, its number among the tokens, and the number of tokens
        up to each, by its end in the text. Empty if the tokens aren't those that the text shows."""
        begins, numbers, after, number = [], [], {}, -1
        seen: set[int] = set()
        for match in self.special_text.finditer(text):
            token = self._ids_of[match[0]]
            seen.add(token)
            try:
                number = ids.index(token, number + 1)
            except ValueError:
                return [], [], {}
            begins.append(match.start())
            numbers.append(number)
            after[match.end()] = number + 1
        if sum(map(ids.count, seen)) != len(begins):
            return [], [], {}
        return begins, numbers, after

    def apart(self, prompt: str, response: str) -> tuple[list[int], list[int], list[int]]:
        """The tokens of a prompt alone, those of the response that follows it, and where in the response each of these
        ends. BadRow if they aren't the text's."""
        prompt_ids = self.ids(prompt)
        joint = self._backend.encode(prompt + response, add_special_tokens=False)
        if joint.ids[: len(prompt_ids)] == prompt_ids:  # by ids: the offsets of some tokens leave out their spaces
            offsets = joint.offsets[len(prompt_ids) :]
            return prompt_ids, joint.ids[len(prompt_ids) :], [end - len(prompt) for _, end in offsets]
        # Encoded by itself, but behind an anchor, because some tokenizers begin a text with a space.
        meant = (prompt + response, self._decoded(joint.ids))  # which a tokenizer may have normalised
        for anchor in (*self._anchors, ""):
            anchor_ids = self.ids(anchor) if anchor else []
            both = self._backend.encode(anchor + response, add_special_tokens=False)
            response_ids = both.ids[len(anchor_ids) :]
            if both.ids[: len(anchor_ids)] == anchor_ids and self._decoded(prompt_ids + response_ids) in meant:
                return prompt_ids, response_ids, [end - len(anchor) for _, end in both.offsets[len(anchor_ids) :]]
        raise BadRow(
            "not_separable",
            f"no tokens of the response follow those of the prompt, which ends in {prompt[-20:]!r}, and give the same "
            "text: move the space from the end of the prompt to the beginning of the response",
        )

    def hidden(self, text: str) -> str:
        """The text with characters in the place of special tokens' text, as many as it has, that a template can't take
        for one of its own words. BadRow if the text has some of these characters already."""
        if any(chr(STAND_INS) <= char < chr(STAND_INS + len(self._names)) for char in text):
            why = "it has characters of Unicode's private use beside special tokens: set data.special_text=as_tokens"
            raise BadRow("special_text", why)
        return self.special_text.sub(lambda match: chr(STAND_INS + self._names.index(match[0])) * len(match[0]), text)

    def as_text(self, hidden: str) -> tuple[list[int], list[int]]:
        """The tokens of a text in which what was hidden is text, and where in it each of them ends."""
        all_ids: list[int] = []
        ends: list[int] = []
        begin = 0
        for match in (*self.special_text.finditer(hidden), None):
            piece = hidden[begin : match.start() if match else len(hidden)]
            if piece:
                ids, piece_ends = self._plain(self._shown(piece))
                all_ids += ids
                ends += [begin + end for end in piece_ends]
            if match:
                all_ids += self.ids(match[0])
                ends.append(match.end())
                begin = match.end()
        return all_ids, ends

    def _plain(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text without special tokens, behind other text, and where each of them ends."""
        tokenizer = self._backend
        tokenizer.encode_special_tokens = True
        try:
            anchor_ids = tokenizer.encode("\n", add_special_tokens=False).ids
            both = tokenizer.encode("\n" + text, add_special_tokens=False)
            if both.ids[: len(anchor_ids)] == anchor_ids:
                return both.ids[len(anchor_ids) :], [end - 1 for _, end in both.offsets[len(anchor_ids) :]]
            alone = tokenizer.encode(text, add_special_tokens=False)
            return alone.ids, [end for _, end in alone.offsets]
        finally:
            tokenizer.encode_special_tokens = False

    def _shown(self, hidden: str) -> str:
        for number, name in enumerate(self._names):
            hidden = hidden.replace(chr(STAND_INS + number) * len(name), name)
        return hidden

    def _decoded(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    @property
    def _backend(self) -> "Tokenizer":
        return backend(self.tokenizer)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return special_ids(self.tokenizer)

    @cached_property
    def _ids_of(self) -> dict[str, int]:
        return dict(zip(self._names, sorted(self.special_ids), strict=True))

    @cached_property
    def _names(self) -> list[str]:
        """The text of each special token."""
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids))]

    @cached_property
    def _anchors(self) -> list[str]:
        """Texts to encode a continuation behind; first a special token, but none that swallows the space after it."""
        added = self.tokenizer.added_tokens_decoder.values()
        return [*[token.content for token in added if token.special and not token.rstrip][:1], *ANCHORS]
