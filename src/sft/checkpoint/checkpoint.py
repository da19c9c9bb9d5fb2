"""Checkpoints on disk: neutral, atomic, and free of who wrote them.

    checkpoints/step-00000100/
      shard-00000-of-00004.safetensors  what one rank wrote: `NAME|FIELD|START` is the flat values of parameter NAME's
                                        FIELD from START on; FIELD is `weight`, `average` (of the weights), or one of
                                        the optimizer's (exp_avg, ...)
      callbacks.json                    state of the callbacks that have any; its tensors are in callbacks.safetensors
      state.json                        step, shapes, hyperparameters of each group, validation loss, what the run was
      probes.json                       log-probabilities of a few samples by the model that was saved
      probes-average.json               the same with the average as its weights
      manifest.json                     size and checksum of each file but state.json, which holds its own

Nothing in it depends on strategy, ranks, accumulation or Lightning's loops: the step names the place in the step
plan, and random numbers are a function of that place. Each rank writes what it holds and reads what it needs, a
tensor at a time, and nothing is gathered. A folder is written beside its name, flushed to disk and renamed: a
half-written one is never seen.
"""

import shutil
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

import torch
from safetensors import safe_open
from torch import Tensor, nn

from sft.checkpoint import plain_state
from sft.checkpoint.layout import Whole, fp32_like, full_shape, named_trainable, persistent_buffers
from sft.checkpoint.safetensors_file import BY_NAME, read_range
from sft.errors import UserError
from sft.ranks import place, together
from sft.runs import saved
from sft.runs.manifest import Damaged

FORMAT = 3
FORMATS = (2, FORMAT)  # that are read: 2 has no manifest


class State(TypedDict):
    """`state.json`."""

    format: int
    step: int
    num_steps: int  # of the whole run
    stopped: bool  # by a callback, before the last step
    stopped_early: NotRequired[str | None]  # by which, and why
    stopped_by: NotRequired[str | None]  # the class of that callback
    callbacks: NotRequired[dict[str, object]]  # their settings
    stops_early: NotRequired[bool]  # whether a callback for early stopping is there
    best: NotRequired["Measured | None"]  # of all validations after a step, saved or not
    validated: NotRequired[bool]  # whether the step's validation is done
    val_loss: float | None
    val_loss_average: NotRequired[float | None]  # with the average as weights
    exports_average: NotRequired[bool]  # whether the run exports that, so that its loss is what counts
    shapes: dict[str, list[int]]  # of each weight by its name in the model
    buffers: list[str]  # those of the names that are buffers
    groups: list[dict[str, object]]  # of the optimizer: hyperparameters, and names of the parameters
    scalars: list[str]  # states that are one number for a whole parameter
    files: list[str]  # the shards
    optimizer_dropped: NotRequired[bool]  # weights alone are left
    metrics: NotRequired[str]  # hash of the rows of metrics.csv before this step
    seed: int
    stop_token_ids: NotRequired[list[int]]
    template: NotRequired[dict[str, object]]  # what the chat template was rendered with, if with anything


class Measured(TypedDict):
    """A validation."""

    step: int
    val_loss: float


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint folder."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name.removeprefix("step-"))

    @cached_property
    def state(self) -> State:
        return saved.state(self.path)  # type: ignore[return-value]

    @property
    def last(self) -> bool:
        """Whether the run ends here: at its last step, or where a callback stopped it."""
        return self.state["stopped"] or self.step >= self.state["num_steps"]

    def callbacks(self) -> dict[str, dict[str, object]]:
        """State of the callbacks by their key."""
        return plain_state.read(self.path)  # type: ignore[return-value]

    @property
    def loss(self) -> float | None:
        """The validation loss that is compared: that of the weights which the run exports."""
        return self.state.get("val_loss_average") if self.state.get("exports_average") else self.state["val_loss"]

    @property
    def has_average(self) -> bool:
        return any(field == "average" for _, field in self._pieces)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of each weight by its name in the model."""
        return self.state["shapes"]

    def dtype(self, name: str) -> torch.dtype:
        return self._pieces[name, "weight"][0].dtype

    def tensor(self, name: str, average: bool = False) -> Tensor:
        """One weight, whole, or its average, in the weight's dtype. Buffers have no average."""
        shape = torch.Size(self.shapes[name])
        field = "average" if average and (name, "average") in self._pieces else "weight"
        whole = torch.empty(shape, dtype=self._pieces[name, field][0].dtype)
        self.read(name, field, 0, whole.view(-1))
        return whole.to(self.dtype(name))

    def read(self, name: str, field: str, start: int, into: Tensor) -> None:
        """Fills the 1-D `into` with the flat values from `start` on."""
        stop, filled = start + len(into), 0
        for piece in self._pieces[name, field]:
            low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
            if low < high:
                values = read_range(piece.file, piece.key, low - piece.start, high - piece.start)
                into[low - start : high - start] = values
                filled += high - low
        assert filled == len(into), f"{self.path}: {name}|{field} lacks {len(into) - filled} values"

    def faults(self) -> list[str]:
        """What is wrong with its files, checksums included, each in a line."""
        return saved.faults(self.path)

    def verify(self) -> list[str]:
        """The same, each rank its share of the files; all ranks get all."""
        return [fault for share in together(lambda: saved.faults(self.path, share=place())) for fault in share]

    def restore(self, layout: Whole, hyperparameters: bool = True) -> None:
        """Puts weights, optimizer state and, if asked to, each group's hyperparameters back: each rank its own part, by
        name."""
        state = self.state
        if state["format"] not in FORMATS:
            raise UserError(f"{self.path} has format {state['format']}, this is {FORMAT}: start the run anew")
        if state.get("optimizer_dropped"):
            raise UserError(f"{self.path} can't be resumed: its optimizer states were dropped")
        model, optimizer = layout.model, layout.optimizer
        own = {name: full_shape(parameter) for name, parameter in named_trainable(model)}
        if own.keys() != state["shapes"].keys() - set(state["buffers"]):
            differing = sorted(own.keys() ^ (state["shapes"].keys() - set(state["buffers"])))
            raise UserError(f"{self.path} is a checkpoint of another model: {', '.join(differing[:3])} differ")
        for name, shape in own.items():
            if shape != state["shapes"][name]:
                raise UserError(
                    f"{self.path} is a checkpoint of another model: {name} has shape {state['shapes'][name]}, the "
                    f"model's is {shape}"
                )
        if len(optimizer.param_groups) != len(state["groups"]):
            raise UserError(
                f"{self.path} has {len(state['groups'])} groups of parameters with settings of their own, this run "
                f"has {len(optimizer.param_groups)}: set parameters.groups as they were, or start another run"
            )
        for group, before in zip(optimizer.param_groups, state["groups"], strict=True):
            # Which of its names decay is for this run to say: an earlier version went by a parameter's shape alone.
            group.update({key: value for key, value in before.items() if hyperparameters and key != "param_names"})
        fields: defaultdict[str, list[str]] = defaultdict(list)  # of the optimizer's states, by the parameter's name
        for name, field in self._pieces:
            if field not in ("weight", "average"):
                fields[name].append(field)
        for part in layout.parts():
            self.read(part.name, "weight", part.start, part.weight)
            if layout.averages is not None and (part.name, "average") in self._pieces:
                if part.holder not in layout.averages:
                    layout.averages[part.holder] = fp32_like(part.holder)
                self.read(part.name, "average", part.start, part.of(layout.averages[part.holder]))
            # States that the optimizer makes at its first step; none of them, no entry.
            for field in fields[part.name]:
                states = optimizer.state[part.holder]
                if field in state["scalars"]:
                    value = torch.empty(1)
                    self.read(part.name, field, 0, value)
                    states[field] = layout.scalar(value, part)
                    continue
                if field not in states:
                    states[field] = torch.zeros_like(part.holder, requires_grad=False)
                self.read(part.name, field, part.start, part.of(states[field]))
        with torch.no_grad():
            for name, buffer in saved_buffers(model):
                whole = torch.empty(buffer.numel(), dtype=buffer.dtype)
                self.read(name, "weight", 0, whole)
                buffer.copy_(whole.view(buffer.shape))
        layout.publish(self.step)

    @cached_property
    def _pieces(self) -> dict[tuple[str, str], list["_Piece"]]:
        """What the files hold, by name and field."""
        pieces: dict[tuple[str, str], list[_Piece]] = {}
        for file_name in sorted(self.state["files"]):
            file = safe_open(self.path / file_name, "pt")
            for key in file.offset_keys():  # in the order in which they were written
                name, field, start = key.rsplit("|", 2)
                values = file.get_slice(key)
                (numel,) = values.get_shape()
                piece = _Piece(file, key, int(start), numel, BY_NAME[values.get_dtype()])
                pieces.setdefault((name, field), []).append(piece)
        return pieces


class _Piece(NamedTuple):
    file: safe_open
    key: str
    start: int
    numel: int
    dtype: torch.dtype


def saved_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Those of the model; none where only an adapter is trained, since the base model has them."""
    all_trained = all(parameter.requires_grad for parameter in model.parameters())
    return persistent_buffers(model) if all_trained else []


def complete(folder: Path) -> list[Checkpoint]:
    """The checkpoints of a folder whose state can be read, oldest first."""
    found = []
    for path in saved.folders(folder).values():
        checkpoint = Checkpoint(path)
        with suppress(Damaged):
            if checkpoint.state:
                found.append(checkpoint)
    return found


def latest(folder: Path) -> Checkpoint | None:
    """The newest of them."""
    return next(reversed(complete(folder)), None)


def to_resume(folder: Path) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that is whole, and what is wrong with each after it: by the sizes of their files, which
    each rank sees alike; the ranks compare checksums when they read it. UserError where none is whole.

    Of a run's last one nothing more is read but by an export, so its checksums are compared here."""
    found, skipped = saved.whole(folder, contents=lambda path: Checkpoint(path).last)
    if found is None and skipped:
        raise Damaged(next(iter(skipped.values())), saved.NONE_IS_WHOLE.format(folder.parent))
    return (Checkpoint(found) if found else None), skipped


def best(checkpoints: list[Checkpoint]) -> Checkpoint | None:
    """The one with the lowest validation loss; the earliest where several are equal; None if none has one."""
    losses = [(checkpoint.loss, checkpoint) for checkpoint in checkpoints]
    known = [(loss, checkpoint) for loss, checkpoint in losses if loss is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None


def measured_best(last: Checkpoint, checkpoints: list[Checkpoint]) -> Measured | None:
    """The lowest of all validations up to a checkpoint, saved or not; of those of `checkpoints` where the run was begun
    before this was kept."""
    if "best" in last.state:
        return last.state["best"]
    lowest = best([checkpoint for checkpoint in checkpoints if checkpoint.step <= last.step])
    if lowest is None or (loss := lowest.loss) is None:
        return None
    return {"step": lowest.step, "val_loss": loss}


def prune(folder: Path, keep_last: int) -> None:
    """Removes all but the last `keep_last` and the best of what is there."""
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
        shutil.rmtree(path) if path.is_dir() else path.unlink()
