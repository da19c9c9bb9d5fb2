"""Tokens whose rows of embeddings and head are trained beside an adapter. The layers are peft's."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROWS = ".token_adapter.trainable_tokens_delta"  # follows the module in the name of its rows; they are no differences


def token_ids(texts: Sequence[str], tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """The tokens' ids, ascending. UserError for a text that isn't exactly one token."""
    ids = set()
    for text in texts:
        own = tokenizer.encode(text, add_special_tokens=False)
        if len(own) != 1:
            raise UserError(
                f"adapter.trainable_tokens: {text!r} is {len(own)} tokens of the tokenizer, not one: name it in "
                "model.add_tokens too, or leave it out"
            )
        ids.update(own)
    return sorted(ids)


def modules_with_rows(model: "PreTrainedModel") -> list[str]:
    """The names of embeddings and head; of the embeddings alone where the head shares their weight."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is None or head.weight is embeddings.weight
    owners = [embeddings] if shared else [embeddings, head]
    return [name for name, module in model.named_modules() if module in owners]


def check(model: "PreTrainedModel") -> None:
    """Refuses embeddings or a head that compute something else with their rows trained than without."""
    from torch import nn

    for kind, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        layer = getattr(getattr(module, "token_adapter", None), "base_layer", module)
        known = type(layer) in (nn.Embedding, nn.Linear) or hasattr(layer, "embed_scale")
        if layer is module or not known or getattr(layer, "bias", None) is not None:
            raise UserError(
                f"adapter.trainable_tokens: the {kind} of {type(model).__name__} can't be trained row by row "
                f"({type(layer).__name__}, or its bias): set adapter.trainable_tokens=null"
            )
