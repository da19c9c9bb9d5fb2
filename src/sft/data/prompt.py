"""A prompt as a server gives it to the model: x of log Pr(y | x), in the tokens of training."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from sft.data import conversation, token_ids
from sft.data.chat_template import ChatTemplate, encode, text_prefix
from sft.data.conversation import Conversation, Empty, Row, RowFunction
from sft.data.shapes import SHAPES
from sft.data.value import is_list, parsed
from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "-"  # an answer where a row has none, for row functions that need one


def served_ids(
    tokenizer: "PreTrainedTokenizerBase",
    row_function: RowFunction,
    asked: Row | str,
    template: Mapping[str, object] | None = None,
) -> list[int]:
    """Token ids that a model trained through `row_function` continues: of a row up to its answer, or of a prompt.
    `template`: arguments of the chat template."""
    given, _ = served(row_function, asked)
    if given.input_ids is not None:
        return given.input_ids
    if given.messages:
        rendering = ChatTemplate(tokenizer, template or {})
        text = rendering.render(given.messages, given.tools, add_generation_prompt=True, arguments=given.template)
        return encode(tokenizer, text).ids
    prefix, ids = text_prefix(tokenizer), encode(tokenizer, given.prompt).ids
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]


def served(row_function: RowFunction, asked: Row | str) -> tuple[Conversation, object]:
    """What a server gives the model, and the reference answer: a text, or the keys of a message; None without one.

    Of a row, all but the last assistant message, which it may lack; of a row of text, the text; of token ids, those
    before the last response. A prompt is a row with this prompt for rows of prompt and response and of Alpaca, so that
    their system message is added; for text and token ids, the text so far; for every other row, the user's only
    message. UserError for a row that the function refuses or finds empty.
    """
    kind = row_function.func if isinstance(row_function, partial) else row_function
    if isinstance(asked, str) and kind not in (conversation.prompt_response, conversation.alpaca):
        if kind in (conversation.text, token_ids.pretokenized):
            return Conversation(prompt=asked), None
        return Conversation([{"role": "user", "content": asked}]), None
    row, no_answer = _with_answer(row_function, asked)
    made = row_function(row)
    if isinstance(made, Empty):
        raise UserError(f"there is nothing to answer ({made.reason})")
    if made.input_ids is not None:
        return _before_response(made), None
    if made.messages is None:
        reference = made.response if made.prompt and not no_answer else None
        return Conversation(prompt=made.prompt or made.response), reference
    messages = made.messages[:-1] if no_answer else made.messages
    answer = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    messages = messages[:-1] if answer else messages
    if not any(message["role"] != "system" for message in messages):
        raise UserError("there is nothing to answer (empty_prompt)")
    rest = {key: value for key, value in (answer or {}).items() if key != "role"}
    weights = made.weights and made.weights[: len(messages)]
    given = replace(made, messages=messages, weights=weights)
    return given, rest["content"] if rest.keys() == {"content"} else rest or None


def _with_answer(row_function: RowFunction, asked: Row | str) -> tuple[Row, bool]:
    """A row with an answer in place of one that it may lack, and whether the last message is that one."""
    kind, keywords = row_function, {}
    if isinstance(row_function, partial):
        kind, keywords = row_function.func, row_function.keywords

    def named(key: str, default: str) -> str:
        return str(keywords.get(key) or default)

    if kind in (conversation.prompt_response, conversation.alpaca):
        of_pair = kind is conversation.prompt_response
        question = named("prompt", "prompt") if of_pair else named("instruction", "instruction")
        answer = named("response", "response") if of_pair else named("output", "output")
        row = {question: asked} if isinstance(asked, str) else asked
        no_answer = not str("" if row.get(answer) is None else row[answer]).strip()
        return ({**row, answer: PLACEHOLDER} if no_answer else row), no_answer
    assert not isinstance(asked, str)
    if kind is conversation.conversational:
        answer = named("response", "completion")
        no_answer = not asked.get(answer)
        return ({**asked, answer: PLACEHOLDER} if no_answer else asked), no_answer
    if kind is conversation.messages:
        column = named("column", "messages")
        placeholder = {named("role", "role"): "assistant", named("content", "content"): PLACEHOLDER}
        turns = asked.get(column)
        if isinstance(turns, str) and turns.lstrip().startswith("["):
            turns = parsed(turns, f"column {column!r}")
        if is_list(turns):  # an answer that there is, is the turn before
            return {**asked, column: [*turns, placeholder]}, True  # type: ignore[misc]
    return asked, False


def _before_response(row: Conversation) -> Conversation:
    """The token ids before the last response."""
    assert row.input_ids is not None and row.labels is not None
    is_learned = [label != token_ids.IGNORE for label in row.labels]
    begins = [at for at, (before, here) in enumerate(pairwise([False, *is_learned])) if here and not before]
    begin = begins[-1] if begins else len(row.labels)
    if not begin:
        raise UserError("there is nothing to answer (empty_prompt)")
    return Conversation(input_ids=row.input_ids[:begin], labels=row.labels[:begin])


def shown(given: Conversation) -> object:
    """The prompt for a reader: its text or, of a conversation with more than one turn so far, the messages."""
    if given.messages is None:
        return given.prompt if given.input_ids is None else given.input_ids
    turns = [message for message in given.messages if message["role"] not in ("system", "developer")]
    return turns[0]["content"] if len(turns) == 1 else given.messages


def prompt_column(row_function: RowFunction) -> tuple[str, str] | None:
    """The setting that names the column of prompts, and the column; None for a row function of the user's own."""
    if isinstance(row_function, partial):
        function = f"{row_function.func.__module__}.{row_function.func.__qualname__}"
        for shape in SHAPES.values():
            if shape.target == function:
                setting = shape.required[0]
                return setting, str(row_function.keywords.get(setting) or shape.arguments[setting])
    return None
