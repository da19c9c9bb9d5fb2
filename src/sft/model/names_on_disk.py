"""What a model's weights are called in its files, which need not be what they are called in the model."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

Specs = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # dtype and shape of each weight, by its name in the model


def names_on_disk(model: PreTrainedModel, specs: Specs) -> dict[str, str] | None:
    """Each weight's name in the model by its name on disk; None if transformers stores tensors of another form.

    The answer comes from transformers' own conversion, applied to tensors that have a shape and no content: a renamed
    tensor is still the same object, one that is split, joined or transposed is a new one.
    """
    ignored = set(model._keys_to_ignore_on_save or ())
    empty = {name: torch.empty(s, dtype=d, device="meta") for name, (d, s) in specs.items() if name not in ignored}
    name_of = {id(tensor): name for name, tensor in empty.items()}
    converted = revert_weight_conversion(model, dict(empty))
    names = {stored: name_of[id(tensor)] for stored, tensor in converted.items() if id(tensor) in name_of}
    return names if len(names) == len(converted) and sorted(names.values()) == sorted(empty) else None
