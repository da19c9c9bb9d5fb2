"""Checkpoints on disk: neutral, atomic, and free of who wrote them.

    checkpoints/step-00000100/
      model.safetensors       every parameter and persistent buffer by its name in the model
      optimizer.safetensors   `NAME|exp_avg`, `NAME|exp_avg_sq`, `NAME|step`: the state of parameter NAME
      callbacks.pt            state of the callbacks that have any
      state.json              step, hyperparameters of each group, validation loss, what the run was
      probes.json             log-probabilities of a few samples by the model that was saved

Nothing in it depends on strategy, ranks, accumulation or Lightning's loops: the step names the place in the step
plan, and random numbers are a function of that place. A folder is written beside its name, flushed to disk and
renamed: a half-written one is never seen.
"""

import io
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from sft.errors import UserError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @property
    def state(self) -> dict[str, Any]:
        return json.loads((self.path / "state.json").read_text())

    @property
    def last(self) -> bool:
        """Whether the run ends here: at its last step, or where a callback stopped it."""
        state = self.state
        return bool(state["stopped"] or self.step >= state["num_steps"])

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each weight."""
        with safe_open(self.path / "model.safetensors", "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  no mapping

    def dtype(self, name: str) -> torch.dtype:
        """Of one weight."""
        with safe_open(self.path / "model.safetensors", "pt") as file:
            return file.get_slice(name)[:0].dtype

    def tensor(self, name: str) -> Tensor:
        """One weight; no other is read."""
        with safe_open(self.path / "model.safetensors", "pt") as file:
            return file.get_tensor(name)

    def callbacks(self) -> dict[str, Any]:
        """State of the callbacks by their key."""
        return torch.load(self.path / "callbacks.pt", map_location="cpu", weights_only=True)

    def restore_model(self, model: nn.Module) -> None:
        """Copies the weights into the model's own tensors; names and shapes must agree."""
        saved = load_file(self.path / "model.safetensors")
        own = dict(named_tensors(model))
        if saved.keys() != own.keys():
            differing = sorted(saved.keys() ^ own.keys())
            raise UserError(f"{self.path} is a checkpoint of another model: {', '.join(differing[:3])} differ")
        for name, tensor in own.items():
            if tensor.shape != saved[name].shape:
                raise UserError(
                    f"{self.path} is a checkpoint of another model: {name} has shape {list(saved[name].shape)}, "
                    f"the model's is {list(tensor.shape)}"
                )
            tensor.data.copy_(saved[name])

    def restore_optimizer(self, optimizer: Optimizer) -> None:
        """Puts each parameter's state and each group's hyperparameters back, by name."""
        tensors = load_file(self.path / "optimizer.safetensors")
        groups = self.state["groups"]
        fresh = optimizer.state_dict()
        for group, saved in zip(fresh["param_groups"], groups, strict=True):
            assert group["param_names"] == saved["param_names"]
            group.update({key: value for key, value in saved.items() if key != "param_names"})
        index = {
            name: number
            for group in fresh["param_groups"]
            for name, number in zip(group["param_names"], group["params"], strict=True)
        }
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, field = key.rpartition("|")
            state.setdefault(index[name], {})[field] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})


def named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Trainable parameters and persistent buffers by name, tied ones once; of a model with an adapter the adapter."""
    parameters = dict(model.named_parameters())
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    yield from trained.items()
    if len(trained) == len(parameters):  # else all that is frozen comes from the pre-trained model
        own_state = model.state_dict(keep_vars=True).keys()
        yield from ((name, buffer) for name, buffer in model.named_buffers() if name in own_state)


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    callbacks: dict[str, Any],
    state: dict[str, Any],
    probes: Any,
) -> Checkpoint:
    """Publishes `folder/step-{step}` whole, or leaves nothing of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    discard_unfinished(folder)
    final = folder / f"step-{step:08d}"
    staging = folder / f".unfinished-{final.name}"
    staging.mkdir()
    optimizer_state = optimizer.state_dict()
    names = {
        number: name
        for group in optimizer_state["param_groups"]
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }
    try:
        # Contiguous copies only where needed; metadata as transformers expects it.
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in named_tensors(model)},
            staging / "model.safetensors",
            metadata={"format": "pt"},
        )
        save_file(
            {
                f"{names[number]}|{field}": value.detach().contiguous()
                for number, fields in optimizer_state["state"].items()
                for field, value in fields.items()
                if isinstance(value, Tensor)
            },
            staging / "optimizer.safetensors",
        )
        # Through memory: torch's own file writer doesn't say that a disk is full.
        buffer = io.BytesIO()
        torch.save(callbacks, buffer)
        (staging / "callbacks.pt").write_bytes(buffer.getvalue())
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer_state["param_groups"]
        ]
        document = {"format": FORMAT, "step": step, **state, "groups": groups}
        (staging / "state.json").write_text(json.dumps(document, indent=2))
        (staging / "probes.json").write_text(json.dumps(probes))
        flush(staging)
        if final.exists():  # the same step again, after a resume from an earlier one
            shutil.rmtree(final)
        staging.rename(final)
        flush(folder, contents=False)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Checkpoint(final)


def complete(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints of a folder, oldest first."""
    return [Checkpoint(path) for path in sorted(folder.glob("step-*"))]


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint."""
    return next(reversed(complete(folder)), None)


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss; the earliest where several are equal; None if none has one."""
    losses = [(checkpoint.state.get("val_loss"), checkpoint) for checkpoint in checkpoints]
    known = [(loss, checkpoint) for loss, checkpoint in losses if loss is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the last `keep_last` and the best. What stays always includes the best so far, so the
    best of what is there is the best of the run."""
    checkpoints = complete(folder)
    kept = {checkpoint.path for checkpoint in checkpoints[-keep_last:]}
    if (lowest := best(checkpoints)) is not None:
        kept.add(lowest.path)
    for checkpoint in checkpoints:
        if checkpoint.path not in kept:
            # Out of sight first: killed in between, nothing half-removed looks complete.
            remove(checkpoint.path.rename(checkpoint.path.with_name(f".unfinished-{checkpoint.path.name}")))


def remove(folder: Path) -> None:
    """Removes a folder that nobody looks at any more."""
    shutil.rmtree(folder)


def discard_unfinished(folder: Path) -> None:
    """Removes what a killed save or removal left behind."""
    for path in folder.glob(".unfinished-*"):
        shutil.rmtree(path)


def flush(folder: Path, contents: bool = True) -> None:
    """Waits until the folder, and by default the files in it, are on the disk."""
    for path in [*(sorted(folder.iterdir()) if contents else []), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
