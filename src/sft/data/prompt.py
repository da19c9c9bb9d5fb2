"""A prompt as a server gives it to the model: x of log Pr(y | x), in the tokens of training."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from sft.data import conversation
from sft.data.chat_template import ChatTemplate, encode, text_prefix
from sft.data.conversation import Conversation, Empty, Row, RowFunction
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
    if given.messages:
        rendering = ChatTemplate(tokenizer, template or {})
        text = rendering.render(given.messages, given.tools, add_generation_prompt=True, arguments=given.template)
        return encode(tokenizer, text).ids
    prefix, ids = text_prefix(tokenizer), encode(tokenizer, given.prompt).ids
    return ids if prefix and ids[: len(prefix)] == prefix else [*prefix, *ids]


def served(row_function: RowFunction, asked: Row | str) -> tuple[Conversation, object]:
    """What a server gives the model, and the reference answer: a text, or the keys of a message; None without one.

    Of a row, all but the last assistant message, which it may lack; of a row of text, the text. A prompt is a row with
    this prompt for rows of prompt and response, so that their system message is added; for text, the text so far; for
    every other row, the user's only message. UserError for a row that the function refuses or finds empty.
    """
    kind = row_function.func if isinstance(row_function, partial) else None
    keywords = row_function.keywords if isinstance(row_function, partial) else {}
    no_answer = False
    if kind is conversation.prompt_response:
        row = {keywords.get("prompt", "prompt"): asked} if isinstance(asked, str) else asked
        response = keywords.get("response", "response")
        no_answer = not str(row.get(response) or "").strip()
        row = {**row, response: PLACEHOLDER} if no_answer else row
    elif isinstance(asked, str):
        is_text = kind is conversation.text
        return Conversation(prompt=asked) if is_text else Conversation([{"role": "user", "content": asked}]), None
    else:
        row, column = asked, keywords.get("column", "messages")
        if kind is conversation.messages and isinstance(turns := asked.get(column), list):
            no_answer = True  # and if there is one, it is the turn before
            placeholder = {keywords.get("role", "role"): "assistant", keywords.get("content", "content"): PLACEHOLDER}
            row = {**row, column: [*turns, placeholder]}
    made = row_function(row)
    if isinstance(made, Empty):
        raise UserError(f"there is nothing to answer ({made.reason})")
    if made.messages is None:
        reference = made.response if made.prompt and not no_answer else None
        return Conversation(prompt=made.prompt or made.response), reference
    messages = made.messages[:-1] if no_answer else made.messages
    answer = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    messages = messages[:-1] if answer else messages
    if not messages:
        raise UserError("there is nothing to answer (empty_prompt)")
    rest = {key: value for key, value in (answer or {}).items() if key != "role"}
    return replace(made, messages=messages), rest["content"] if rest.keys() == {"content"} else rest or None


def shown(given: Conversation) -> object:
    """The prompt for a reader: its text or, of a conversation with more than one turn so far, the messages."""
    if given.messages is None:
        return given.prompt
    turns = [message for message in given.messages if message["role"] not in ("system", "developer")]
    return turns[0]["content"] if len(turns) == 1 else given.messages


def prompt_column(row_function: RowFunction) -> tuple[str, str] | None:
    """The setting that names the column of prompts, and the column; None for a row function of the user's own."""
    if isinstance(row_function, partial):
        for kind, setting in (
            (conversation.prompt_response, "prompt"),
            (conversation.messages, "column"),
            (conversation.text, "column"),
        ):
            if row_function.func is kind:
                default = "prompt" if setting == "prompt" else kind.__name__
                return setting, row_function.keywords.get(setting, default)
    return None
