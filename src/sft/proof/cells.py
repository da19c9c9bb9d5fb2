"""The cells of a certificate: which fits are made, what a rank does in one, and how it is compared."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from sft.checkpoint.checkpoint import Checkpoint
from sft.proof.excerpt import Excerpt
from sft.proof.reference import Reference

STRATEGIES = ("single", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
NUM_STEPS = 20
RESUME_AT = 10
GLOBAL_BATCH_SIZE = 16  # packs: one for each micro-batch of 4 ranks that accumulate 4
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = {"deepspeed_zero3": 1e-5}
DEFAULT_WEIGHT_TOLERANCE = 1e-6
GPU_WEIGHT_TOLERANCE = 1e-5  # its sums are in other orders, and in another each time
# In bf16 a certificate asks how far off the change of all weights is, as a share of it. What is right was seen to be
# off by up to 0.028 and in its losses by 0.003, the mildest of the planted faults by 0.096 and 0.009.
BF16_LOSS_TOLERANCE, BF16_CHANGE_TOLERANCE = 5e-3, 5e-2
LEAST_MOVEMENT = 100  # tolerances: that weights are equal proves nothing where they hardly move


@dataclass(frozen=True)
class Cell:
    """One fit and what is to be equal in it."""

    strategy: str
    num_ranks: int
    accumulation: int
    packed: bool
    resumed: bool
    optimizer: str
    precision: str = "32-true"
    device: str = "cpu"

    @property
    def group(self) -> tuple[int, str]:
        return self.num_ranks, self.strategy

    @property
    def exact(self) -> bool:
        """Whether each weight is compared, and not the change of all of them."""
        return self.precision == "32-true"

    @property
    def tolerance(self) -> float:
        """Of the weights after the last step."""
        if not self.exact:
            return BF16_CHANGE_TOLERANCE
        return GPU_WEIGHT_TOLERANCE if self.device == "gpu" else self.least_tolerance

    @property
    def least_tolerance(self) -> float:
        return WEIGHT_TOLERANCE.get(self.strategy, DEFAULT_WEIGHT_TOLERANCE)

    @property
    def loss_tolerance(self) -> float:
        return LOSS_TOLERANCE if self.exact else BF16_LOSS_TOLERANCE

    def __str__(self) -> str:
        packed = "packed" if self.packed else "unpacked"
        start = "resumed" if self.resumed else "uninterrupted"
        return (
            f"{self.strategy}-{self.num_ranks}ranks-accumulation{self.accumulation}-{packed}-{self.optimizer}-{start}"
        )


@dataclass(frozen=True)
class Result:
    """The largest differences of a cell from the reference; NaN where it gave no numbers. Where a cell isn't `exact`,
    `weight` is the difference of all weights over their change."""

    cell: Cell
    loss: float = math.nan
    grad_norm: float = math.nan
    weight: float = math.nan
    error: str | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        # NaN is within no tolerance.
        return not self.error and self.loss <= self.cell.loss_tolerance and self.weight <= self.cell.tolerance

    def document(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("loss", "grad_norm", "weight")}
        known = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        return {
            **asdict(self.cell),
            **{f"{name}_difference": number for name, number in known.items()},
            "loss_tolerance": self.cell.loss_tolerance,
            "weight_tolerance": self.cell.tolerance,
            "passed": self.passed,
            "error": self.error,
            "seconds": round(self.seconds, 2),
        }


def all_cells(quick: bool = False, precision: str = "32-true", device: str = "cpu", most_ranks: int = 4) -> list[Cell]:
    """All cells, those of one group of ranks together, each resumed one right after the one it resumes."""
    made = []
    for num_ranks, strategy in product((1, 2) if quick else (1, 2, 4), STRATEGIES):
        if (strategy == "single" and num_ranks > 1) or num_ranks > most_ranks:
            continue
        for accumulation, packed, optimizer in product((1, 2, 4), (True, False), ("sgd", "adamw")):
            # Quick: each value of each, and no two strategies alike in fewer than these.
            if quick and (accumulation, packed, optimizer) not in ((2, True, "sgd"), (1, False, "adamw")):
                continue
            made += [
                Cell(strategy, num_ranks, accumulation, packed, resumed, optimizer, precision, device)
                for resumed in (False, True)
            ]
    return made


@dataclass(frozen=True)
class Outcome:
    """What a cell's ranks hand back: the metrics of each step, and where the last checkpoint lies."""

    losses: list[float]
    grad_norms: list[float]
    checkpoint: Path


def run_cell(config: dict[str, Any], folder: Path, cell: Cell) -> Outcome:
    """One rank's part of a cell. `folder` holds model and samples, and then a folder for each cell."""
    from sft.training.datamodule import SFTDataModule
    from sft.training.fit import fit
    from sft.training.metrics import MetricsFile
    from sft.training.prepare import model_source

    own = OmegaConf.create(config)
    own.strategy, own.optimizer = own.strategies[cell.strategy], own.optimizers[cell.optimizer]
    own.trainer.devices = cell.num_ranks
    here = folder / str(cell)
    begun = folder / str(replace(cell, resumed=False)) / "checkpoints"
    resume = Checkpoint(begun / f"step-{RESUME_AT:08d}") if cell.resumed else None
    samples = Excerpt.load(folder / "samples.npz")
    data = SFTDataModule(
        samples,
        None,
        seed=own.seed,
        epochs=NUM_STEPS,
        max_steps=NUM_STEPS,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=GLOBAL_BATCH_SIZE // (cell.num_ranks * cell.accumulation),
        max_length=samples.max_length,
        packing=cell.packed,
        start_step=RESUME_AT if cell.resumed else 0,
    )
    metrics = MetricsFile(here / "metrics.csv")
    fit(
        own,
        model_source(own),
        data,
        accumulation=cell.accumulation,
        checkpoints=here / "checkpoints",
        resume=resume,
        loggers=[metrics],
        facts={"seed": own.seed},
    )
    return Outcome(
        [float(row["train/loss"]) for row in metrics.rows],
        [float(row["train/grad_norm"]) for row in metrics.rows],
        here / "checkpoints" / f"step-{NUM_STEPS:08d}",
    )


def compare(cell: Cell, outcome: Outcome, reference: Reference) -> Result:
    """The largest differences; the weights are those of the last checkpoint, so it is certified too."""
    start = RESUME_AT if cell.resumed else 0
    checkpoint = Checkpoint(outcome.checkpoint)
    if len(outcome.losses) != NUM_STEPS - start:
        return Result(cell, error=f"{len(outcome.losses)} steps instead of {NUM_STEPS - start}")
    if checkpoint.shapes.keys() != reference.weights.keys():
        differing = sorted(checkpoint.shapes.keys() ^ reference.weights.keys())
        return Result(cell, error=f"the checkpoint holds other parameters: {', '.join(differing[:3])}")
    if reference.movement < LEAST_MOVEMENT * cell.least_tolerance:
        return Result(cell, error=f"the weights moved by {reference.movement:.1e} only: raise the learning rate")
    off = [(checkpoint.tensor(name).float().numpy() - weight).ravel() for name, weight in reference.weights.items()]
    weight = np.abs(np.concatenate(off)).max() if cell.exact else np.linalg.norm(np.concatenate(off)) / reference.change
    return Result(
        cell,
        loss=_largest(outcome.losses, reference.losses[start:]),
        grad_norm=_largest(outcome.grad_norms, reference.grad_norms[start:]),
        weight=float(weight),
    )


def _largest(here: list[float], there: list[float]) -> float:
    return float(np.abs(np.array(here) - np.array(there)).max())
