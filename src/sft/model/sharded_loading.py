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

from sft.checkpoint.layout import Whole, allocate, persistent_buffers
from sft.checkpoint.safetensors_file import read_range
from sft.model.adapter import TRAINED_WHOLE, Adapter, base_name
from sft.model.vocabulary import Growth

Read = Callable[[str, int, int], Tensor]  # name, start, stop -> flat values, 1-D


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
    drawn: Mapping[str, Callable[[], Tensor]] | None = None,
    growth: Growth | None = None,
) -> None:
    """Shards a model whose parameters hold nothing yet, and reads each rank's part of each weight into its place.

    Args:
        load_whole: the same model with its weights, where they can't be read range by range from `path`: those drawn
            at random (`path` None), or stored under other names. It takes the whole model's memory.
        weights: read them; without, and without an adapter, their values stay undefined.
        sharding: without, the model stays whole.
        drawn: the value of each weight that the files lack.
        growth: of the vocabulary, beyond what the files hold.
    """
    drawn = drawn or {}
    shapes = {name: list(tensor.shape) for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]}
    if adapter:
        adapter.add(model)
    if sharding is not None:
        sharding.shard(model)
    else:
        allocate(model, torch.device("cpu"))
        model.tie_weights()  # each module got memory of its own
    if not (weights or adapter):
        return
    if growth:
        shapes |= {name: [growth.stored, *shapes[name][1:]] for name in growth.names if name in shapes}
    stored = {name: shape for name, shape in shapes.items() if name not in drawn}
    read = weight_reader(path, revision, stored, model.base_model_prefix) if path else None
    if read is None:
        whole = load_whole()
        values = {name: tensor.detach().reshape(-1) for name, tensor in whole.named_parameters()}
        values |= {name: buffer.reshape(-1) for name, buffer in persistent_buffers(whole)}
        read = lambda name, start, stop: values[name][start:stop]  # noqa: E731
        drawn, growth = {}, None
    new, read_stored = drawn, read

    def value(name: str, start: int, stop: int) -> Tensor:
        if growth is None or name not in growth.names:
            return new[name]().view(-1)[start:stop] if name in new else read_stored(name, start, stop)
        shape = shapes[name]
        whole = new[name]() if name in new else read_stored(name, 0, torch.Size(shape).numel()).view(shape)
        return growth.grow(whole).view(-1)[start:stop]

    layout = sharding.layout if sharding is not None else Whole
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = layout.part(name, parameter)
            stop = part.start + part.numel
            if adapter and parameter.requires_grad and TRAINED_WHOLE not in name:
                first = adapter.first(name, parameter)
                assert first is not None, f"{name} is computed from whole weights"
                part.weight.copy_(first.view(-1)[part.start : stop])
            else:
                part.weight.copy_(value(base_name(name), part.start, stop))
            layout.loaded(parameter)
        for name, buffer in persistent_buffers(model):
            buffer.copy_(read(name, 0, buffer.numel()).view(buffer.shape))


def weight_reader(source: str, revision: str | None, shapes: Mapping[str, list[int]], prefix: str) -> Read | None:
    """`read(name, start, stop)` of the flat values of each weight in a model's safetensors files.

    None where the files name or shape their tensors otherwise than the model does.
    """
    files = [safe_open(path, "pt") for path in weight_files(source, revision)]
    file_of = {key: file for file in files for key in file.keys()}  # noqa: SIM118  it is no mapping
    keys = {}
    for name, shape in shapes.items():
        # A file of the bare backbone leaves out the first part of the name.
        key = name if name in file_of else name.removeprefix(f"{prefix}.")
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
