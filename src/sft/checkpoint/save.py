"""Writes a checkpoint, all ranks at once: whole, or nothing of its name."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from sft.checkpoint import plain_state, safetensors_file
from sft.checkpoint.checkpoint import FORMAT, Checkpoint, discard_unfinished, remove, saved_buffers
from sft.checkpoint.layout import Part, Whole, flat, full_shape, named_trainable
from sft.checkpoint.safetensors_file import BY_NAME
from sft.errors import UserError
from sft.ranks import place, together
from sft.runs import lease, manifest, saved
from sft.runs.files import fsync
from sft.runs.manifest import Entry, Manifest


def save(
    folder: Path,
    step: int,
    layout: Whole,
    callbacks: Mapping[str, object],
    state: Mapping[str, object],
    probes: Mapping[str, Sequence[object]],
) -> Checkpoint:
    """Publishes `folder/step-{step}` whole, or leaves nothing of that name. Called by every rank."""
    rank, world_size = place()
    final = folder / f"step-{step:08d}"
    staging, replaced = folder / f".unfinished-{final.name}", folder / f".unfinished-replaced-{final.name}"
    shard = f"shard-{rank:05d}-of-{world_size:05d}.safetensors"

    def begin() -> None:
        if rank == 0:
            lease.check()
            folder.mkdir(parents=True, exist_ok=True)
            discard_unfinished(folder)
            staging.mkdir()

    def write() -> Manifest:
        written = _write_shard(staging / shard, layout, rank, world_size)
        fsync(staging / shard)
        return {shard: written}

    def finish() -> None:
        if rank == 0:
            contents = plain_state.dump(dict(callbacks))
            contents |= {f"{name}.json": json.dumps(measured).encode() for name, measured in probes.items()}
            for name, content in contents.items():
                (staging / name).write_bytes(content)
            document = {"format": FORMAT, "step": step, **state, **_description(layout), "files": sorted(files)}
            manifest.write_sealed(staging / "state.json", document)
            flush(staging)
            manifest.write(staging, files | manifest.entries(staging, contents))
            lease.check()
            if final.exists():  # the same step again, after a resume from an earlier one
                final.rename(replaced)  # a removal that is killed must leave nothing that looks complete
            staging.rename(final)
            flush(folder, contents=False)
            if replaced.exists():
                remove(replaced)

    try:
        together(begin)
        files = {name: written for shard_files in together(write) for name, written in shard_files.items()}
        together(finish)
    except BaseException:
        if rank == 0 and not lease.is_lost():  # else it can be another's
            shutil.rmtree(staging, ignore_errors=True)
        raise
    return Checkpoint(final)


def drop_optimizer(checkpoint: Checkpoint) -> None:
    """Rewrites a checkpoint without the optimizer's states: at each moment it is complete, with them or without."""
    state, folder = checkpoint.state, checkpoint.path
    shards, known = list(state["files"]), manifest.read(folder, saved.ADVICE)
    if known is None:  # it was written before there were any
        known = manifest.entries(folder, [path.name for path in folder.iterdir() if path.name != "state.json"])
    if not state.get("optimizer_dropped"):
        known |= {f"weights-{name}": _weights_alone(folder / name, folder / f"weights-{name}") for name in shards}
        shards = [f"weights-{name}" for name in shards]
        flush(folder)
        manifest.write(folder, known)
        # What is read from now on: until it has this name, the old files are.
        dropped = {**state, "format": FORMAT, "files": shards, "scalars": [], "optimizer_dropped": True}
        manifest.write_sealed(folder / "state.json", dropped)
    unused = {path.name for path in folder.glob("*shard-*.safetensors")} - {*shards}
    manifest.write(folder, {name: entry for name, entry in known.items() if name not in unused})
    for name in unused:
        (folder / name).unlink()


def _weights_alone(shard: Path, into: Path) -> Entry:
    """Copies weights and averages, one at a time; size and checksum of the file."""
    with safe_open(shard, "pt") as file:
        slices = {key: file.get_slice(key) for key in file.offset_keys()}
        entries = {
            key: (BY_NAME[values.get_dtype()], values.get_shape())
            for key, values in slices.items()
            if key.rsplit("|", 2)[1] in ("weight", "average")
        }
        return safetensors_file.write(into, entries, file.get_tensor)


def _write_shard(path: Path, layout: Whole, rank: int, world_size: int) -> Entry:
    """Writes this rank's share of weights and optimizer state; size and checksum of the file."""
    parts = layout.parts()
    if layout.replicated:
        parts = _dealt(parts, rank, world_size)
    states = layout.optimizer.state
    values: dict[str, Tensor] = {}  # views of what is in memory anyway
    for part in parts:
        values[f"{part.name}|weight|{part.start}"] = part.weight
        if layout.averages:
            values[f"{part.name}|average|{part.start}"] = part.of(layout.averages[part.holder])
        for field, value in states.get(part.holder, {}).items():
            if is_scalar(value):
                if part.start == 0:
                    values[f"{part.name}|{field}|0"] = torch.tensor([float(value)])
            elif isinstance(value, Tensor):
                if flat(value).numel() != flat(part.holder).numel():
                    raise UserError(f"the optimizer's state {field} of {part.name} isn't shaped like it: use another")
                values[f"{part.name}|{field}|{part.start}"] = part.of(value)
    if rank == 0:
        values |= {f"{name}|weight|0": buffer.reshape(-1) for name, buffer in saved_buffers(layout.model)}
    entries = {key: (value.dtype, list(value.shape)) for key, value in values.items()}
    return safetensors_file.write(path, entries, values.__getitem__)


def is_scalar(value: object) -> bool:
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


def _description(layout: Whole) -> dict[str, object]:
    """Shapes, hyperparameters of each group, and which states are single numbers."""
    optimizer = layout.optimizer
    shapes = {name: full_shape(parameter) for name, parameter in named_trainable(layout.model)}
    buffers = {name: list(buffer.shape) for name, buffer in saved_buffers(layout.model)}
    states = optimizer.state.values()
    scalars = sorted({field for state in states for field, value in state.items() if is_scalar(value)})
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return {"groups": groups, "shapes": shapes | buffers, "buffers": list(buffers), "scalars": scalars}


def flush(folder: Path, contents: bool = True) -> None:
    """Waits until the folder, and by default the files in it, are on the disk."""
    for path in [*(sorted(folder.iterdir()) if contents else []), folder]:
        fsync(path)
