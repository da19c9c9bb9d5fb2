"""A model whose weights are read range by range, each rank its own, into the place that its strategy keeps them in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from sft.checkpoint.layout import Read, Whole, allocate, named_trainable, persistent_buffers
from sft.checkpoint.safetensors_file import read_range
from sft.model.adapter import TRAINED_WHOLE, Adapter, base_name
from sft.model.names_on_disk import names_on_disk
from sft.model.parameters import NO_DECAY, Parameters
from sft.model.vocabulary import Growth


class Sharding(Protocol):
    """A strategy that shards a model before its weights are read."""

    @property
    def layout(self) -> type[Whole]: ...

    def shard(self, model: nn.Module) -> None:
        """Takes a model whose parameters hold nothing yet and gives each rank room for its part of them."""


def load_sharded(
    model: PreTrainedModel,
    load_whole: Callable[[], PreTrainedModel],
    *,
    path: str | None,
    revision: str | None,
    adapter: Adapter | None,
    weights: bool,
    sharding: Sharding | None,
    parameters: Parameters | None = None,
    drawn: Mapping[str, Callable[[], Tensor]] | None = None,
    growth: Growth | None = None,
) -> Read | None:
    """Shards a model whose parameters hold nothing yet, and reads each rank's part of each weight into its place.

    Args:
        load_whole: the same model with its weights, where they can't be read range by range from `path`: those drawn
            at random (`path` None), or stored under other names. It takes the whole model's memory.
        weights: read them; without, their values stay undefined.
        sharding: without, the model stays whole.
        parameters: which of them are trained; None: all.
        drawn: the value of each weight that the files lack.
        growth: of the vocabulary, beyond what the files hold.

    Returns what was read, in fp32, for who keeps the weights in another dtype; None where nothing was.
    """
    drawn = drawn or {}
    own_weights = [*model.named_parameters(), *persistent_buffers(model)]
    shapes = {name: list(tensor.shape) for name, tensor in own_weights}
    on_disk = names_on_disk(model, {name: (tensor.dtype, tensor.shape) for name, tensor in own_weights}) or {}
    keys = {name: key for key, name in on_disk.items()}
    if adapter:
        adapter.add(model)
    if parameters:
        parameters.choose(model)
    flagged = [name for name, parameter in model.named_parameters() if hasattr(parameter, NO_DECAY)]
    if sharding is not None:
        sharding.shard(model)
    else:
        allocate(model, torch.device("cpu"))
        model.tie_weights()  # each module got memory of its own
    for name in flagged:  # the parameters are others now
        setattr(model.get_parameter(name), NO_DECAY, True)
    if not weights:
        return None
    if growth:
        shapes |= {name: [growth.stored, *shapes[name][1:]] for name in growth.names if name in shapes}
    stored = {name: shape for name, shape in shapes.items() if name not in drawn}
    read = weight_reader(path, revision, stored, model.base_model_prefix, keys) if path else None
    if read is None:
        whole = load_whole()
        values = {name: tensor.detach().reshape(-1) for name, tensor in whole.named_parameters()}
        values |= {name: buffer.reshape(-1) for name, buffer in persistent_buffers(whole)}
        read = lambda name, start, stop: values[name][start:stop]  # noqa: E731
        drawn, growth = {}, None
    new, read_stored = drawn, read

    def stored_value(name: str, start: int, stop: int) -> Tensor:
        if growth is None or name not in growth.names:
            return new[name]().view(-1)[start:stop] if name in new else read_stored(name, start, stop)
        shape = shapes[name]
        whole = new[name]() if name in new else read_stored(name, 0, torch.Size(shape).numel()).view(shape)
        return growth.grow(whole).view(-1)[start:stop]

    layout = sharding.layout if sharding is not None else Whole
    own: dict[str, Tensor] = {}  # an adapter's, flat

    def first(name: str, start: int, stop: int) -> Tensor:
        return own[name][start:stop] if name in own else stored_value(base_name(name), start, stop)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if adapter and parameter.requires_grad and TRAINED_WHOLE not in name:
                value = adapter.first(name, parameter)
                assert value is not None, f"{name} is computed from whole weights"
                own[name] = value.view(-1)
            part = layout.part(name, parameter)
            part.weight.copy_(first(name, part.start, part.start + part.numel))
            layout.loaded(parameter)
        for name, buffer in persistent_buffers(model):
            buffer.copy_(read(name, 0, buffer.numel()).view(buffer.shape))
    return first


def first_values(model: PreTrainedModel, path: str | None, revision: str | None) -> Read:
    """The trainable values of a whole model that was just loaded in fp32, which stay when its weights are rounded: read
    anew from `path` where its files allow it, or else held in memory."""
    trainable = dict(named_trainable(model))
    shapes = {name: list(parameter.shape) for name, parameter in trainable.items()}
    if path and (read := weight_reader(path, revision, shapes, model.base_model_prefix)):
        return read
    held = {name: parameter.detach().view(-1) for name, parameter in trainable.items()}
    return lambda name, start, stop: held[name][start:stop]


def weight_reader(
    source: str,
    revision: str | None,
    shapes: Mapping[str, list[int]],
    prefix: str,
    on_disk: Mapping[str, str] | None = None,
) -> Read | None:
    """`read(name, start, stop)` of the flat values of each weight in a model's safetensors files.

    `on_disk`: what transformers calls a weight in files, where that differs. None where they name or shape their
    tensors in another way.
    """
    files = [safe_open(path, "pt") for path in weight_files(source, revision)]
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  it is no mapping
    keys = {}
    for name, shape in shapes.items():
        # A file of the bare backbone leaves out the first part of the name.
        likely = ((on_disk or {}).get(name, name), name, name.removeprefix(f"{prefix}."))
        key = next((key for key in likely if key in file_of), name)
        if key not in file_of or file_of[key].get_slice(key).get_shape() != shape:
            return None
        keys[name] = key
    return lambda name, start, stop: read_range(file_of[keys[name]], keys[name], start, stop)


def weight_files(source: str, revision: str | None, download: bool = True) -> list[str]:
    """A model's safetensors files, from a folder or the Hub; none where a weight is in another format, or, without
    `download`, not here."""
    folder = Path(source).expanduser()
    path = str(folder) if folder.is_dir() else source

    def file(name: str) -> str | None:
        return cached_file(
            path,
            name,
            revision=revision,
            local_files_only=not download,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    if whole := file("model.safetensors"):
        return [whole]
    if (index := file("model.safetensors.index.json")) is None:
        return []
    files = [file(name) for name in sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))]
    return [path for path in files if path] if all(files) else []
