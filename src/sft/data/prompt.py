"""A prompt as a server gives it to the model: x of log Pr(y | x), in the tokens of training."""

from functools import partial
from typing import TYPE_CHECKING

from sft.data import conversation
from sft.data.build import RowFunction
from sft.data.chat_template import encode, render, text_prefix
from sft.data.conversation import Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def served_ids(tokenizer: "PreTrainedTokenizerBase", row_function: RowFunction, prompt: str) -> list[int]:
    """Token ids that a model trained through `row_function` is to continue after `prompt`.

    For rows of prompt and response, what the function makes of a row with this prompt, its system message included;
    for text, the text so far; for every other row, the prompt as the user's only message.
    """
    asked: Conversation = Conversation(messages=[{"role": "user", "content": prompt}])
    if isinstance(row_function, partial) and row_function.func is conversation.prompt_response:
        names = {key: row_function.keywords.get(key, key) for key in ("prompt", "response")}
        made = row_function({names["prompt"]: prompt, names["response"]: "-"})
        if isinstance(made, Conversation):  # the assistant's answer is what is asked for
            asked = Conversation(made.messages[:-1] if made.messages else None, prompt=made.prompt)
    elif isinstance(row_function, partial) and row_function.func is conversation.text:
        asked = Conversation(prompt=prompt)
    if asked.messages:
        return encode(tokenizer, render(tokenizer, asked.messages, None, add_generation_prompt=True)).ids
    return [*text_prefix(tokenizer), *encode(tokenizer, asked.prompt).ids]
