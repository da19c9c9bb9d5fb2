"""Which part of a model text runs through: of a vision-language model that alone is trained, the rest is frozen."""

from math import prod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def has_rest(config: "PretrainedConfig") -> bool:
    """Whether a configuration describes parts of a model beside its language part."""
    from transformers import PretrainedConfig

    text = config.get_text_config()
    return any(isinstance(value, PretrainedConfig) and value is not text for value in vars(config).values())


def rest(model: "PreTrainedModel") -> "dict[str, nn.Parameter]":
    """The parameters that text doesn't reach: towers of other kinds of input, and what joins them to the language part.

    The language part is the decoder, as the model itself names it, with embeddings and head, without what holds a part
    of the decoder that reads other things than text.
    """
    config, embeddings = model.config, model.get_input_embeddings()
    others = {part for part in model.modules() if "text" not in getattr(part, "input_modalities", "text")}
    if config.get_text_config() is config and not others:
        return {}
    decoder = model.get_decoder()
    language = [part for part in decoder.children() if embeddings in (own := {*part.modules()}) or not own & others]
    parts = [*language, embeddings, model.get_output_embeddings()]
    kept = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    kept |= {id(parameter) for parameter in decoder.parameters(recurse=False)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) not in kept}


def freeze_rest(model: "PreTrainedModel") -> None:
    for parameter in rest(model).values():
        parameter.requires_grad_(False)


def said(model: "PreTrainedModel") -> str | None:
    """A line on what is frozen; None where nothing is."""
    from sft.checkpoint.layout import full_shape

    if not (frozen := rest(model)):
        return None
    num, places = sum(prod(full_shape(parameter)) for parameter in frozen.values()), rest_modules(model)
    return (
        f"{type(model).__name__}: only its language part is trained; the rest, {num:,} parameters "
        f"({', '.join(places[:4])}{', ...' if len(places) > 4 else ''}), is frozen and exported unchanged"
    )


def rest_modules(model: "PreTrainedModel") -> list[str]:
    """The names of the largest modules (or parameters) that are all frozen rest."""
    frozen = rest(model)
    language = [name for name, _ in model.named_parameters() if name not in frozen]

    def largest(name: str) -> str:
        parts = name.split(".")
        places = (".".join(parts[:length]) for length in range(1, len(parts)))
        return next((place for place in places if not any(own.startswith(f"{place}.") for own in language)), name)

    return list(dict.fromkeys(map(largest, frozen)))
