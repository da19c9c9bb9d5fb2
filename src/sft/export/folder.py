"""A Hugging Face folder: a model is written to it one weight at a time, proves itself by reloading, and is loaded."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from sft.checkpoint import safetensors_file
from sft.data.chat_template import special_ids
from sft.errors import UserError
from sft.export.verify import Probe, Verdict
from sft.model import model_class
from sft.model.adapter import quantization
from sft.model.loading import ModelSource
from sft.model.missing import without_report
from sft.model.names_on_disk import Specs as Specs
from sft.model.names_on_disk import names_on_disk

Read = Callable[[str], Tensor]  # one weight by that name


def write_model(
    folder: Path,
    source: ModelSource,
    specs: Specs,
    read: Read,
    generation: GenerationConfig,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    log: Callable[[str], None] = print,
) -> None:
    """Writes weights and configuration, holding one weight at a time; `dtype` None keeps each weight's own.

    All weights are held at once, and `log` gets a line, if transformers stores this kind of model in a form that it
    doesn't compute with.
    """
    specs = {name: (dtype if dtype and own.is_floating_point else own, shape) for name, (own, shape) in specs.items()}

    def convert(name: str) -> Tensor:
        return read(name).to(specs[name][0])

    # Only shapes are needed: transformers knows how a model's names are written to disk.
    model = empty_model(source, next(own for own, _ in specs.values() if own.is_floating_point))
    model.generation_config = generation
    names = names_on_disk(model, specs)
    if names is None:
        log(f"export {folder}: transformers stores this kind of model in another form, so all of it is held in memory")
        state = {name: convert(name) for name in specs}
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    else:
        model.save_pretrained(folder, state_dict={})  # all but the weights
        write_shards(folder, specs, convert, names, max_shard_size)


def empty_model(source: ModelSource, dtype: torch.dtype | None = None, adapter: bool = False) -> PreTrainedModel:
    """The model without its weights: names, shapes and layers."""
    model = source.empty(source.load_config(), dtype)
    if adapter:
        assert source.adapter is not None
        with torch.device("meta"):
            source.adapter.add(model, source.trained_ids)
    return model


def write_shards(folder: Path, specs: Specs, read: Read, names: Mapping[str, str], max_shard_size: int | str) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_size` (bytes, or "5GB") and their index.

    `names`: the weights' names in the model by their names on disk.
    """
    stored = {name: specs[own] for name, own in names.items()}
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in stored.items()}
    try:
        split = split_torch_state_dict_into_shards(
            empty, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
    except ValueError as error:
        raise UserError(f'max_shard_size={max_shard_size} is no size: set bytes, or a size like "5GB"') from error
    for file, shard in split.filename_to_tensors.items():
        safetensors_file.write(folder / file, {name: stored[name] for name in shard}, lambda name: read(names[name]))
    if split.is_sharded:
        num_parameters = sum(tensor.numel() for tensor in empty.values())
        metadata = {"total_parameters": num_parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def generation_config(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerFast,
    stop_ids: list[int],
    log: Callable[[str], None] = print,
) -> GenerationConfig:
    """The base model's, ending at `stop_ids`, and at the tokens at which that model ends. It keeps a sampling
    temperature, which is its author's advice.

    `log` gets a line if settings are left out. UserError if transformers can't use the base model's.
    """
    generation = _base_generation_config(source, log) if source.init == "pretrained" else GenerationConfig()
    base_ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    # A configuration's default may name a token that means something else to this tokenizer.
    special = special_ids(tokenizer)
    ends = [*dict.fromkeys([*stop_ids, *(token for token in base_ids if token in special)])]
    generation.eos_token_id = ends
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    return generation


def _base_generation_config(source: ModelSource, log: Callable[[str], None]) -> GenerationConfig:
    """Without the settings that its other settings leave without effect, such as a temperature with do_sample=false:
    transformers loads them and refuses to save them."""
    assert source.base is not None
    try:
        generation = GenerationConfig.from_pretrained(source.base, revision=source.base_revision or "main")
        if idle := _without_effect(generation):
            values = ", ".join(f"{name}={getattr(generation, name)}" for name in idle)
            log(
                f"the generation config of {source.base} sets {values} without effect (do_sample="
                f"{bool(generation.do_sample)}, num_beams={generation.num_beams or 1}): left out of the export"
            )
            for name in idle:
                setattr(generation, name, None)
            generation.validate(strict=True)
    except Exception as error:
        broken = isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError)
        if isinstance(error, OSError) and not broken:  # the model has none
            return GenerationConfig()
        message = " ".join(str(error).split())[:300]
        raise UserError(
            f"the generation config of {source.base} can't be used: {message}: correct generation_config.json in a "
            "copy of the model's folder, and name that in model.path"
        ) from error
    return generation


def _without_effect(generation: GenerationConfig) -> list[str]:
    """The settings that transformers calls invalid because of others; ValueError for any other fault."""
    try:
        generation.validate(strict=True)
    except ValueError as error:
        if names := re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE):
            return names
        raise
    return []


def verify(
    folder: Path,
    probes: list[Probe],
    precision: str,
    quantized: bool = False,
    step: int | None = None,
    trust_remote_code: bool = False,
) -> Verdict:
    """Reloads the folder in a fresh process and compares log-probabilities with the training model's.

    `quantized`: training held the base model of the folder's adapter in 4 bits, and so does the comparison. `step`: of
    the training, for the record. Writes
    `verified.json` into the folder and returns it; `UserError` if they differ.
    """
    request = {
        "probes": probes,
        "precision": precision,
        "quantized": quantized,
        "step": step,
        "trust_remote_code": trust_remote_code,
    }
    process = subprocess.run(
        [sys.executable, "-m", "sft.export.verify", str(folder)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"the export in {folder} can't be loaded again: {last}")
    verdict: Verdict = json.loads((folder / "verified.json").read_text())
    if not verdict["equal"]:
        raise UserError(
            f"the export in {folder} is not the model that was trained: log-probabilities differ by "
            f"{verdict[verdict['compared']]:.3g} (tolerance {verdict['tolerance']:.3g}); see its verified.json"
        )
    return verdict


def load_exported(folder: Path, attention: str | None = None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a verified folder, in evaluation mode on the GPU if there is one.

    It is a whole model, or an adapter over the base model that it names. `attention` None leaves the implementation
    to transformers.
    """
    options: dict[str, object] = {"attn_implementation": attention, "dtype": "auto"}
    where: dict[str, object] = {"trust_remote_code": trust_remote_code}
    is_adapter = (folder / "adapter_config.json").exists()
    if is_adapter:
        verified: Verdict = json.loads((folder / "verified.json").read_text())
        options["dtype"] = "bfloat16" if verified["precision"] == "bf16-true" else "float32"
        if verified["quantized"]:
            options |= quantization()
    # Of an adapter's rows of embeddings that are the head's too, transformers says that the head has none.
    with without_report() if is_adapter else nullcontext():
        model = model_class.of_folder(_base(folder), **where).from_pretrained(folder, **options, **where)
    if is_adapter:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return model.eval()


def _base(folder: Path) -> str:
    """The folder, or of an adapter's the base model that it names."""
    adapter = folder / "adapter_config.json"
    return str(json.loads(adapter.read_text())["base_model_name_or_path"]) if adapter.exists() else str(folder)
