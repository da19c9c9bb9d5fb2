"""Chat template and tokenizer: the text of a conversation, its tokens, and the token that ends a turn."""

import re
from typing import TYPE_CHECKING

from sft.data.conversation import Message, Tools
from sft.errors import UserError

if TYPE_CHECKING:  # a second to import, which `sft --help` need not pay
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

NO_STOP = (
    "the chat template does not end an assistant turn with a special token, so the model would never learn "
    "to stop: set model.chat_template to one that does"
)


def render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[Message],
    tools: Tools,
    add_generation_prompt: bool = False,
) -> str:
    """The text of the messages. UserError without a template, or if the template refuses them."""
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template: set model.chat_template=FILE, or "
            "data.conversation.chat=false for plain prompt and response"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages,  # type: ignore[arg-type]  # declared as messages of strings alone
            tools=list(tools) if tools else None,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
    except Exception as error:  # a template is a program: it may raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"the chat template refuses these messages: {reason}") from error
    assert isinstance(text, str)
    return text


def generation_spans(
    tokenizer: "PreTrainedTokenizerBase", messages: list[Message], tools: Tools
) -> list[tuple[int, int]] | None:
    """The template's {% generation %} blocks, in characters of the text; None if it has none.

    Not by `apply_chat_template(return_assistant_tokens_mask=True)`: with trimmed offsets that drops a span whose first
    token is a space, and every span after it.
    """
    template = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    if not re.search(r"{%-?\s*generation\s*-?%}", template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: object = render_jinja_template(
        [messages],
        tools=list(tools) if tools else None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,  # type: ignore[arg-type]
    )
    assert isinstance(rendered, tuple)  # the texts and their spans
    return list(rendered[1][0])


def encode(tokenizer: "PreTrainedTokenizerBase", text: str, add_special_tokens: bool = False) -> "Encoding":
    """Tokens of the text. By default none are added: a chat template writes its own BOS."""
    # verbose: no warning for each text over the model's length, since `max_length` is checked elsewhere
    encodings = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).encodings
    assert encodings is not None, "a fast tokenizer has encodings"
    return encodings[0]


def text_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The tokens that the tokenizer puts before a text, usually BOS; those after it have no place in a prompt."""
    bare = encode(tokenizer, "x").ids
    whole: list[int] = encode(tokenizer, "x", add_special_tokens=True).ids
    return next(whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare)


def special_ids(tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}


def stop_token_id(tokenizer: "PreTrainedTokenizerBase", *, chat: bool) -> int:
    """The token that ends a response: in a chat the first special token that the template puts after a reply, in plain
    text EOS. UserError if there is none."""
    if not chat:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token to end a response with: set its eos_token")
        return int(tokenizer.eos_token_id)
    reply = "sentinel"
    probe: list[Message] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": reply}]
    _, rendered_reply, rest = render(tokenizer, probe, None).rpartition(reply)
    special = special_ids(tokenizer)
    stop = next((token for token in encode(tokenizer, rest).ids if token in special), None)
    if not rendered_reply or stop is None:
        raise UserError(NO_STOP)
    return stop
