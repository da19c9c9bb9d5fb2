"""A model's weights as a Hugging Face folder: shards, tokenizer, chat template, generation config, model card."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.checkpoint import safetensors_file
from sft.errors import UserError
from sft.model.loading import ModelSource

Layout = Mapping[str, tuple[torch.dtype, Sequence[int]]]  # dtype and shape of each weight, by its name in the model
Read = Callable[[str], Tensor]  # one weight by that name


def write_folder(
    folder: Path,
    source: ModelSource,
    layout: Layout,
    read: Read,
    tokenizer: Any,
    stop_ids: list[int],
    card: str,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    log: Callable[[str], None] = print,
) -> None:
    """Writes the folder, holding one weight at a time; `dtype` None keeps each weight's own.

    `log` is told where transformers stores the model's weights in another form than it computes with, and so all of
    them have to be held at once.
    """
    from transformers import AutoModelForCausalLM

    layout = {name: (dtype if dtype and own.is_floating_point else own, shape) for name, (own, shape) in layout.items()}

    def convert(name: str) -> Tensor:
        return read(name).to(layout[name][0])

    config = source.load_config()
    config.dtype = next(own for own, _ in layout.values() if own.is_floating_point)
    # Only the shape of the model is needed: transformers knows how its names are written to disk.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    model.generation_config = generation_config(source, tokenizer, stop_ids)
    names = names_on_disk(model, layout)
    if names is None:
        log(f"export {folder}: transformers stores this kind of model in another form, so all of it is held in memory")
        state = {name: convert(name) for name in layout}
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    else:
        model.save_pretrained(folder, state_dict={})  # all but the weights
        write_shards(folder, layout, convert, names, max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def names_on_disk(model: Any, layout: Layout) -> dict[str, str] | None:
    """The weight's name in the model by its name on disk; None where transformers stores other tensors than those.

    Which it does is asked of its own conversion, with tensors that have a shape and no content: a name that changes
    still names the same tensor afterwards, a tensor that is split, joined or transposed is a new one.
    """
    from transformers.core_model_loading import revert_weight_conversion

    ignored = set(model._keys_to_ignore_on_save or ())
    empty = {
        name: torch.empty(shape, dtype=dtype, device="meta")
        for name, (dtype, shape) in layout.items()
        if name not in ignored
    }
    name_of = {id(tensor): name for name, tensor in empty.items()}
    stored = {name: name_of.get(id(tensor)) for name, tensor in revert_weight_conversion(model, dict(empty)).items()}
    names = {name: own for name, own in stored.items() if own is not None}
    return names if sorted(names.values()) == sorted(empty) and len(names) == len(stored) else None


def write_shards(folder: Path, layout: Layout, read: Read, names: Mapping[str, str], max_shard_size: int | str) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_size` (bytes, or "5GB") and their index."""
    empty = {name: torch.empty(layout[own][1], dtype=layout[own][0], device="meta") for name, own in names.items()}
    split = split_shards(empty, max_shard_size)
    for file, stored in split.filename_to_tensors.items():
        safetensors_file.write(
            folder / file, {name: layout[names[name]] for name in stored}, lambda name: read(names[name])
        )
    if split.is_sharded:
        num_parameters = sum(tensor.numel() for tensor in empty.values())
        metadata = {"total_parameters": num_parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def split_shards(tensors: dict[str, Tensor], max_shard_size: int | str) -> Any:
    """Which tensor goes into which file, as transformers would have it."""
    from huggingface_hub import split_torch_state_dict_into_shards

    try:
        return split_torch_state_dict_into_shards(
            tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(f'max_shard_size={max_shard_size} is no size: set bytes, or a size like "5GB"') from error


def generation_config(source: ModelSource, tokenizer: Any, stop_ids: list[int]) -> Any:
    """The base model's, ending at `stop_ids`. A sampling temperature in it is its author's advice."""
    from transformers import GenerationConfig

    generation = GenerationConfig()
    if source.init == "pretrained":
        path: Any = source.path
        options: dict[str, Any] = {"revision": source.revision}
        with suppress(OSError):
            generation = GenerationConfig.from_pretrained(path, **options)
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    # A configuration's default may name a token that means something else to this tokenizer.
    known = [token for token in known if token in tokenizer.all_special_ids and token not in stop_ids]
    generation.eos_token_id = [*stop_ids, *known]
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    return generation


def verify(
    folder: Path,
    probes: list[dict[str, Any]],
    precision: str,
    quantized: bool = False,
) -> dict[str, Any]:
    """Reloads the folder in a fresh process and compares log-probabilities with the training model's.

    `quantized`: the base model that the folder's adapter lies beside is held in 4 bits, as in training.
    Writes `verified.json` into the folder and returns it; `UserError` where they differ.
    """
    request = {"probes": probes, "precision": precision, "quantized": quantized}
    process = subprocess.run(
        [sys.executable, "-m", "sft.export.verify", str(folder)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the export in {folder} can't be loaded again: {last}")
    verdict: dict[str, Any] = json.loads((folder / "verified.json").read_text())
    if not verdict["equal"]:
        raise UserError(
            f"the export in {folder} is not the model that was trained: log-probabilities differ by "
            f"{verdict[verdict['compared']]:.3g} (tolerance {verdict['tolerance']:.3g}); see its verified.json"
        )
    return verdict


def publish(staging: Path, final: Path) -> None:
    """Puts a complete folder in the place of what was there before."""
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
