"""Writes a checkpoint, all ranks at once: whole, or nothing of its name."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft.checkpoint import safetensors_file, shards
from sft.checkpoint.checkpoint import FORMAT, Checkpoint, discard_unfinished, saved_buffers
from sft.checkpoint.shards import Part
from sft.errors import UserError
from sft.ranks import place, together


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Any,
    callbacks: dict[str, Any],
    state: dict[str, Any],
    probes: Any,
) -> Checkpoint:
    """Publishes `folder/step-{step}` whole, or leaves nothing of that name. Called by every rank."""
    rank, world_size = place()
    final = folder / f"step-{step:08d}"
    staging = folder / f".unfinished-{final.name}"
    shard = f"shard-{rank:05d}-of-{world_size:05d}.safetensors"

    def begin() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            discard_unfinished(folder)
            staging.mkdir()

    def write() -> dict[str, dict[str, int]]:
        written = _write_shard(staging / shard, model, optimizer, rank, world_size)
        flush_file(staging / shard)
        return {shard: written}

    def finish() -> None:
        if rank == 0:
            document = {"format": FORMAT, "step": step, **state, **_description(model, optimizer), "files": files}
            _write_rest(staging, document, callbacks, probes)
            if final.exists():  # the same step again, after a resume from an earlier one
                shutil.rmtree(final)
            staging.rename(final)
            flush(folder, contents=False)

    try:
        together(begin)
        files = {name: written for each in together(write) for name, written in each.items()}
        together(finish)
    except BaseException:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return Checkpoint(final)


def _write_shard(path: Path, model: nn.Module, optimizer: Any, rank: int, world_size: int) -> dict[str, int]:
    """Writes this rank's share of weights and optimizer state; size and checksum of the file."""
    parts = shards.held(model, optimizer)
    if shards.replicated(model, optimizer):
        parts = _dealt(parts, rank, world_size)
    states = shards.inner(optimizer).state
    values: dict[str, Tensor] = {}  # views of what is in memory anyway
    for part in parts:
        values[f"{part.name}|weight|{part.start}"] = part.weight
        for field, value in states.get(part.holder, {}).items():
            if is_scalar(value):
                if part.start == 0:
                    values[f"{part.name}|{field}|0"] = torch.tensor([float(value)])
            elif isinstance(value, Tensor):
                if shards.flat(value).numel() != shards.flat(part.holder).numel():
                    raise UserError(f"the optimizer's state {field} of {part.name} isn't shaped like it: use another")
                values[f"{part.name}|{field}|{part.start}"] = part.of(value)
    if rank == 0:
        values |= {f"{name}|weight|0": buffer.reshape(-1) for name, buffer in saved_buffers(model)}
    layout = {key: (value.dtype, list(value.shape)) for key, value in values.items()}
    return safetensors_file.write(path, layout, values.__getitem__)


def is_scalar(value: Any) -> bool:
    """Whether a state is one number for the whole parameter, as the number of steps is."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.ndim == 0)


def _dealt(parts: list[Part], rank: int, world_size: int) -> list[Part]:
    """This rank's share of what all ranks hold alike: equal ranges of all values laid end to end."""
    total = sum(part.numel for part in parts)
    low, high = total * rank // world_size, total * (rank + 1) // world_size
    dealt, at = [], 0
    for part in parts:
        start, stop = max(low, at) - at, min(high, at + part.numel) - at
        if start < stop:
            dealt.append(replace(part, start=part.start + start, offset=part.offset + start, numel=stop - start))
        at += part.numel
    return dealt


def _description(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """Shapes, hyperparameters of each group, and which states are single numbers."""
    shapes = {name: shards.full_shape(parameter) for name, parameter in shards.named_trainable(model)}
    buffers = {name: list(buffer.shape) for name, buffer in saved_buffers(model)}
    states = shards.inner(optimizer).state.values()
    scalars = sorted({field for state in states for field, value in state.items() if is_scalar(value)})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"groups": groups, "shapes": shapes | buffers, "buffers": list(buffers), "scalars": scalars}


def _write_rest(staging: Path, document: dict[str, Any], callbacks: dict[str, Any], probes: Any) -> None:
    # Through memory: torch's own file writer doesn't say that a disk is full.
    buffer = io.BytesIO()
    torch.save(callbacks, buffer)
    (staging / "callbacks.pt").write_bytes(buffer.getvalue())
    (staging / "state.json").write_text(json.dumps(document, indent=2))
    (staging / "probes.json").write_text(json.dumps(probes))
    flush(staging)


def flush(folder: Path, contents: bool = True) -> None:
    """Waits until the folder, and by default the files in it, are on the disk."""
    for path in [*(sorted(folder.iterdir()) if contents else []), folder]:
        flush_file(path)


def flush_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
