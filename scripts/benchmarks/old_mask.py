"""The mask as it was: each turn renders and encodes all before it, and each prompt is encoded beside the whole."""

from typing import Any

from sft.data.conversation import Conversation


def num_tokens(tokenizer: Any, conversation: Conversation, stop: int) -> int:
    """The tokens of a conversation's sample, found the old way; the sample itself is thrown away."""
    messages = conversation.messages or []
    ids: list[int] = []
    labels: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or i == 0:
            continue
        prompt = encode(tokenizer, render(tokenizer, messages[:i], add_generation_prompt=True)).ids
        joint = encode(tokenizer, render(tokenizer, messages[: i + 1]))
        assert joint.ids[: len(prompt)] == prompt, "a token straddles the boundary"
        rest, ends = joint.ids[len(prompt) :], [end for _, end in joint.offsets[len(prompt) :]]
        length = max(place for place, token in enumerate(rest) if token == stop) + 1
        labels = labels + [-100] * (len(prompt) - len(ids)) + rest[:length]
        ids = prompt + rest[: len(ends[:length])]
    assert len(ids) == len(labels)
    return len(ids)


def render(tokenizer: Any, messages: list[Any], add_generation_prompt: bool = False) -> str:
    text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
    return text


def encode(tokenizer: Any, text: str) -> Any:
    return tokenizer(text, add_special_tokens=False, verbose=False).encodings[0]
