"""A trained adapter as a folder for peft, or merged into the base model's weights, one weight at a time."""

import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.checkpoint import safetensors_file
from sft.checkpoint.layout import persistent_buffers
from sft.export.folder import Read, Specs, empty_model
from sft.model.adapter import NAME, TRAINED_WHOLE, stored_name
from sft.model.loading import ModelSource
from sft.model.names_on_disk import names_on_disk
from sft.model.sharded_loading import weight_reader
from sft.model.trained_tokens import ROWS

if TYPE_CHECKING:
    from peft import PeftConfig


def write_adapter(folder: Path, source: ModelSource, specs: Specs, read: Read, dtype: torch.dtype | None) -> None:
    """Writes the weights and configuration that peft and transformers load over the base model; `dtype` None keeps
    each weight's own."""
    adapter_config(source).save_pretrained(str(folder))
    names = {stored_name(name): name for name in specs}
    stored_specs = {stored: (dtype or specs[name][0], specs[name][1]) for stored, name in names.items()}
    safetensors_file.write(
        folder / "adapter_model.safetensors",
        stored_specs,
        lambda stored: read(names[stored]).to(stored_specs[stored][0]),
    )


def adapter_config(source: ModelSource) -> "PeftConfig":
    """The adapter's configuration, which names the base model."""
    from peft import PeftConfig

    config = empty_model(source, adapter=True).peft_config[NAME]
    assert isinstance(config, PeftConfig) and source.base is not None
    config.inference_mode = True
    local = Path(source.base).expanduser()
    # A folder's whole path means the same wherever the adapter is loaded.
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else source.base
    config.revision = source.base_revision
    return config


def merged(source: ModelSource, specs: Specs, read: Read, dtype: torch.dtype) -> tuple[Specs, Read]:
    """The whole model's weights, from an adapter's: W + alpha / r · B A for each adapted layer; with DoRA its rows are
    brought to the length of their magnitudes.

    A weight is computed in fp32 when it is read, and has the `dtype` that the run held the base model in. Only one
    weight is in memory, unless transformers changes the base model's tensors when it loads them: peft merges those all
    at once.
    """
    from peft.tuners.lora import LoraLayer

    base = empty_model(source, dtype=dtype)
    merged_specs = _specs(weights(base))
    read_base = stored_weights(source, base, merged_specs)
    if read_base is None:
        tensors = merged_by_peft(source, specs, read, dtype)
        return _specs(tensors), tensors.__getitem__
    modules = empty_model(source, adapter=True).named_modules()
    layers = {f"{name}.weight": module for name, module in modules if isinstance(module, LoraLayer)}

    def merged_weight(name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        if (trained := f"{owner}{TRAINED_WHOLE}{own}") in specs:
            return read(trained)
        weight = read_base(name)  # as the run held it
        if (rows := f"{owner}{ROWS}.{NAME}") in specs:
            return weight.index_copy(0, torch.tensor(source.trained_ids), read(rows).to(weight.dtype))
        if name not in layers:
            return weight
        layer = name.removesuffix("weight")
        a, b = (read(f"{layer}{matrix}.{NAME}.weight").float() for matrix in ("lora_A", "lora_B"))
        added = (b @ a).mul_(layers[name].scaling[NAME])  # in fp32, and in place: as large as the weight
        transposed = layers[name].fan_in_fan_out  # type: ignore[attr-defined]  # of linear layers, and there are no others
        whole = (added.T if transposed else added).add_(weight)
        if (magnitude := f"{layer}lora_magnitude_vector.{NAME}.weight") in specs:  # DoRA: arXiv 2402.09353, equation 5
            outputs = whole.T if transposed else whole
            outputs.mul_((read(magnitude).float() / torch.linalg.norm(outputs, dim=1))[:, None])
        return whole.to(weight.dtype)

    return merged_specs, merged_weight


def completed(source: ModelSource, specs: Specs, read: Read) -> tuple[Specs, Read]:
    """The whole model's weights, from those that were trained and the base model's."""
    dtype = next(own for own, _ in specs.values())
    base = empty_model(source, dtype=dtype)
    whole = _specs(weights(base))
    read_base = stored_weights(source, base, whole) or weights(source.load(dtype)).__getitem__
    return whole, lambda name: (read if name in specs else read_base)(name)


def merged_by_peft(source: ModelSource, specs: Specs, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
    """The merged model's weights by name."""
    from peft import PeftModel

    base = replace(source, path=source.base, revision=source.base_revision, adapter=None).load(dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's remarks, as when the adapter was added
        write_adapter(Path(folder), source, specs, read, None)
        model = PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
        return weights(model.merge_and_unload())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once."""
    return {name: tensor.detach() for name, tensor in [*model.named_parameters(), *persistent_buffers(model)]}


def stored_weights(source: ModelSource, model: PreTrainedModel, specs: Specs) -> Read | None:
    """Reads one weight of the pre-trained model's files; None if they hold tensors of another form than the model."""
    names = names_on_disk(model, specs)
    if names is None or len(names) < len(specs):
        return None
    assert source.base is not None
    shapes = {stored: list(specs[name][1]) for stored, name in names.items()}
    read_range = weight_reader(source.base, source.base_revision, shapes, model.base_model_prefix)
    if read_range is None:
        return None
    stored_names = {name: stored for stored, name in names.items()}

    def read(name: str) -> Tensor:
        dtype, shape = specs[name]
        return read_range(stored_names[name], 0, torch.Size(shape).numel()).view(shape).to(dtype)

    return read


def _specs(tensors: dict[str, Tensor]) -> Specs:
    return {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
