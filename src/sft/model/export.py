"""A checkpoint as a Hugging Face folder: weights, tokenizer, chat template, generation config, model card."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from sft.errors import UserError
from sft.model.loading import ModelSource


def write_folder(
    folder: Path,
    source: ModelSource,
    tensors: dict[str, torch.Tensor],
    tokenizer: Any,
    stop_ids: list[int],
    card: str,
    dtype: torch.dtype | None,
) -> None:
    """Writes the folder; `dtype` None keeps that of `tensors`."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    own_dtype = next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point())
    if dtype is not None:
        tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    config = source.load_config()
    config.dtype = dtype or own_dtype
    # Only the shape of the model is needed: transformers knows how its names are written to disk.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    generation = _generation_config(source, GenerationConfig)
    known = generation.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    # A configuration's default may name a token that means something else to this tokenizer.
    known = [token for token in known if token in tokenizer.all_special_ids and token not in stop_ids]
    generation.eos_token_id = [*stop_ids, *known]
    if generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop_ids[0]
    model.generation_config = generation
    model.save_pretrained(folder, state_dict=tensors)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(card)


def _generation_config(source: ModelSource, kind: Any) -> Any:
    """The base model's generation config, or an empty one: a sampling temperature in it is the author's advice."""
    if source.init == "pretrained":
        try:
            return kind.from_pretrained(source.path, revision=source.revision)
        except OSError:
            pass
    return kind()


def verify(
    folder: Path, probes: list[dict[str, Any]], precision: str, tolerance: float | None = None
) -> dict[str, Any]:
    """Reloads the folder in a fresh process and compares log-probabilities with the training model's.

    Writes `verified.json` into the folder and returns it; `UserError` where they differ.
    """
    request = {"probes": probes, "precision": precision, "tolerance": tolerance}
    process = subprocess.run(
        [sys.executable, "-m", "sft.model.verify", str(folder)],
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
            f"the export in {folder} is not the model that was trained: log-probabilities differ by up to "
            f"{verdict['largest_difference']:.3g} (tolerance {verdict['tolerance']:g}); see its verified.json"
        )
    return verdict


def publish(staging: Path, final: Path) -> None:
    """Puts a complete folder in the place of what was there before."""
    if final.exists():
        shutil.rmtree(final)
    staging.rename(final)
