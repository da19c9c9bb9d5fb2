"""A model whose weights are read range by range, each rank its own, into the place that its strategy keeps them in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sft.checkpoint.safetensors_file import File
from sft.checkpoint.shards import allocate, full_shape, of_parameter, persistent_buffers
from sft.model.adapter import initial

if TYPE_CHECKING:
    from sft.model.loading import ModelSource

Read = Callable[[str, int, int], Tensor]  # name, start, stop -> flat values, 1-D


def load_streamed(
    source: "ModelSource",
    config: Any,
    options: dict[str, Any],
    weights: bool,
    shard: Callable[[nn.Module], None] | None,
) -> Any:
    """Makes the model without weights, shards it, and reads each rank's part of each weight into its place.

    `shard` None keeps it whole; without `weights`, and without an adapter, their values stay undefined.
    """
    trusted = {"trust_remote_code": source.trust_remote_code}
    with init_empty_weights():  # parameters only: buffers such as RoPE's frequencies keep their fp32 values
        model = AutoModelForCausalLM.from_config(config, **trusted, **options)
    model.tie_weights()
    shapes = {name: list(tensor.shape) for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]}
    if source.adapter:
        source.adapter.add(model)
    (shard or _allocate)(model)
    if not (weights or source.adapter):
        return model
    read = weight_reader(source.path, source.revision, shapes, model.base_model_prefix) if source.path else None
    if source.init == "random" or read is None:
        # Drawn at random, or on disk under other names: this takes the whole model's memory.
        if source.init == "random":
            whole = AutoModelForCausalLM.from_config(config, **trusted, **options)
        else:
            assert source.path is not None
            whole = AutoModelForCausalLM.from_pretrained(
                source.path, config=config, revision=source.revision, **trusted, **options
            )
        named = [*whole.named_parameters(), *persistent_buffers(whole)]
        flat = {name: tensor.detach().reshape(-1) for name, tensor in named}
        read = lambda name, start, stop: flat[name][start:stop]  # noqa: E731
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            part = of_parameter(name, parameter)
            stop = part.start + part.numel
            if source.adapter and parameter.requires_grad:
                values = initial(name, full_shape(parameter)).view(-1)[part.start : stop]
            else:
                values = read(name.replace(".base_layer.", "."), part.start, stop)
            part.weight.copy_(values)
            if hasattr(parameter, "ds_secondary_tensor"):  # ZeRO++'s second copy is of before
                parameter.ds_secondary_tensor = None
        for name, buffer in persistent_buffers(model):
            buffer.copy_(read(name, 0, buffer.numel()).view(buffer.shape))
    return model


def _allocate(model: Any) -> None:
    """The whole model in this process's memory."""
    allocate(model, torch.device("cpu"))
    model.tie_weights()  # each module got memory of its own


def weight_reader(source: str, revision: str | None, shapes: Mapping[str, list[int]], prefix: str) -> Read | None:
    """`read(name, start, stop)` of the flat values of each weight in a model's safetensors files.

    None where the files name or shape their tensors otherwise than the model does.
    """
    folder = Path(source).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    if not all((folder / name).exists() for name in names):
        return None
    file_of = {key: file for file in (File(folder / name) for name in sorted(names)) for key in file.layout}
    keys = {}
    for name, shape in shapes.items():
        # A file of the bare backbone leaves out the first part of the name.
        key = name if name in file_of else name.removeprefix(f"{prefix}.")
        if key not in file_of or file_of[key].layout[key][1] != shape:
            return None
        keys[name] = key
    return lambda name, start, stop: file_of[keys[name]].read(keys[name], start, stop)
