"""A prompt as a server gives it to the model: x of log Pr(y | x), in the tokens of training."""

from functools import partial
from typing import TYPE_CHECKING

from sft.data import conversation
from sft.data.chat_template import encode, render, text_prefix
from sft.data.conversation import Conversation, RowFunction

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def served_ids(tokenizer: "PreTrainedTokenizerBase", row_function: RowFunction, prompt: str) -> list[int]:
    """Token ids that a model trained through `row_function` continues after `prompt`.

    For rows of prompt and response, the function is applied to a row with this prompt, and so adds its system message;
    for text, the prompt is the text so far; for every other row, it is the user's only message.
    """
    served = Conversation(messages=[{"role": "user", "content": prompt}])
    if isinstance(row_function, partial) and row_function.func is conversation.prompt_response:
        columns = {name: row_function.keywords.get(name, name) for name in ("prompt", "response")}
        answered = row_function({columns["prompt"]: prompt, columns["response"]: "-"})
        if isinstance(answered, Conversation):  # all but the assistant's answer
            served = Conversation(answered.messages[:-1] if answered.messages else None, prompt=answered.prompt)
    elif isinstance(row_function, partial) and row_function.func is conversation.text:
        served = Conversation(prompt=prompt)
    if served.messages:
        return encode(tokenizer, render(tokenizer, served.messages, None, add_generation_prompt=True)).ids
    return [*text_prefix(tokenizer), *encode(tokenizer, served.prompt).ids]
