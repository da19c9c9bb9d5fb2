"""A trained adapter as a folder for peft, or merged into the base model's weights, one weight at a time."""

import json
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sft.checkpoint import safetensors_file
from sft.export.folder import Layout, Read, generation_config, names_on_disk
from sft.model.adapter import NAME
from sft.model.loading import ModelSource


def write_adapter(
    folder: Path,
    source: ModelSource,
    layout: Layout,
    read: Read,
    tokenizer: Any,
    stop_ids: list[int],
    card: str,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a folder that peft's `PeftModel` and transformers' `AutoModelForCausalLM` load over the base model."""
    write_weights(folder, source, layout, read, dtype)
    generation_config(source, tokenizer, stop_ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def write_weights(folder: Path, source: ModelSource, layout: Layout, read: Read, dtype: torch.dtype | None) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    config = empty_model(source, adapter=True).peft_config[NAME]
    config.inference_mode = True
    assert source.path is not None
    local = Path(source.path).expanduser()
    # Of a folder the whole path, so that it means the same wherever the adapter is loaded from.
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else source.path
    config.revision = source.revision
    config.save_pretrained(str(folder))
    names = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": name for name in layout}
    stored = {name: (dtype or layout[own][0], layout[own][1]) for name, own in names.items()}
    safetensors_file.write(
        folder / "adapter_model.safetensors", stored, lambda name: read(names[name]).to(stored[name][0])
    )


def merged(source: ModelSource, layout: Layout, read: Read) -> tuple[Layout, Read]:
    """The whole model's layout and weights, of an adapter's: W + alpha / r · B A where there is an adapter.

    A weight is computed in fp32 when it is asked for, and is in the dtype that the run held it in. No more than that
    one is in memory, but for files that transformers doesn't load as they are: those peft merges, all at once.
    """
    from peft.tuners.lora import LoraLayer

    dtype = next(own for own, _ in layout.values())
    base = empty_model(source, dtype=dtype)
    whole = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in weights(base).items()}
    stored = stored_weights(source, base, whole)
    if stored is None:
        tensors = merged_by_peft(source, layout, read, dtype)
        return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}, tensors.__getitem__
    modules = empty_model(source, adapter=True).named_modules()
    layers: dict[str, Any] = {f"{name}.weight": module for name, module in modules if isinstance(module, LoraLayer)}

    def weight(name: str) -> Tensor:
        file, stored_name = stored[name]
        with safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(stored_name).to(whole[name][0])  # as the run held it
        if name not in layers:
            return tensor
        a, b = (read(f"{name.removesuffix('weight')}lora_{each}.{NAME}.weight").float() for each in "AB")
        added = (b @ a).mul_(layers[name].scaling[NAME])  # in fp32, and in place: as large as the weight
        return (added.T if layers[name].fan_in_fan_out else added).add_(tensor).to(tensor.dtype)

    return whole, weight


def merged_by_peft(source: ModelSource, layout: Layout, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
    """The merged model's weights by name."""
    from peft import PeftModel

    base: Any = replace(source, adapter=None).load(dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of peft's, as when the adapter was put in
        write_weights(Path(folder), source, layout, read, None)
        model: Any = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        return weights(model.merge_and_unload())


def empty_model(source: ModelSource, dtype: torch.dtype | None = None, adapter: bool = False) -> Any:
    """The model without its weights: names, shapes and layers."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": dtype} if dtype else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            source.load_config(), trust_remote_code=source.trust_remote_code, **options
        )
        if adapter:
            assert source.adapter is not None
            source.adapter.add(model)
    return model


def weights(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    own_state = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in own_state}
    return {name: tensor.detach() for name, tensor in (dict(model.named_parameters()) | buffers).items()}


def stored_weights(source: ModelSource, model: Any, layout: Layout) -> dict[str, tuple[str, str]] | None:
    """File of the pre-trained model, and name there, of each weight; None where they aren't all there as they are."""
    from transformers.utils.hub import cached_file

    path: Any = source.path

    def found(name: str) -> str | None:
        options: dict[str, Any] = {"revision": source.revision, "_raise_exceptions_for_missing_entries": False}
        return cached_file(str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path, name, **options)

    if file := found("model.safetensors"):
        files = [file]
    elif index := found("model.safetensors.index.json"):
        shards = [found(name) for name in sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))]
        files = [shard for shard in shards if shard]
    else:
        return None
    there: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            there |= {name: (file, opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    names = names_on_disk(model, layout) or {}
    stored = {own: (there[name][0], name) for name, own in names.items() if name in there}
    as_they_are = all(there[name][1] == list(layout[own][1]) for own, (_, name) in stored.items())
    return stored if as_they_are and stored.keys() == layout.keys() else None
