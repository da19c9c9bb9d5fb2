"""The cells of a certificate: which fits are made, what a rank does in one, and how it is compared."""

import copy
import math
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf

from sft.checkpoint.checkpoint import Checkpoint
from sft.proof.excerpt import Excerpt
from sft.proof.reference import Reference
from sft.training.datamodule import SFTDataModule
from sft.training.fit import fit
from sft.training.metrics_file import MetricsFile
from sft.training.prepare import model_source

STRATEGIES = ("single", "ddp", "deepspeed_zero1", "deepspeed_zero2", "deepspeed_zero3", "fsdp2")
NUM_STEPS = 20
RESUME_AT = 10
GLOBAL_BATCH_SIZE = 16  # packs: one for each micro-batch of 4 ranks that accumulate 4
LOSS_TOLERANCE = 1e-5
WEIGHT_TOLERANCE = {"deepspeed_zero3": 1e-5}
DEFAULT_WEIGHT_TOLERANCE = 1e-6
GPU_WEIGHT_TOLERANCE = 1e-5  # the order of a GPU's sums is another, and varies from run to run
# In bf16 the difference of all weights is compared, in multiples of the noise: what the plain loop differs by when its
# matrix products are in bf16, which every strategy rounds. A number of 8 bits is off by 2^-9.2 (root mean square), n
# independent roundings by √n of that. A strategy with bf16 weights also rounds what is between the products, which at
# most doubles n: √2 of the noise, and an eighth on top.
BF16_LOSS_TOLERANCE, BF16_NOISES = 5e-3, 1.6
LEAST_MOVEMENT = 1e-3  # a hundred tolerances: equal weights prove nothing if they hardly moved
# No training is nearer to the loop than the loop to itself with its first weights a rounding away, which AdamW makes
# large for a weight with hardly a gradient, such as the decay of linear attention. That is one rounding for each weight
# where a fit rounds otherwise in each step: four times it, up to the largest tolerance.
ROUNDINGS, LARGEST_WEIGHT_TOLERANCE = 4, 1e-5

Key = tuple[str, bool, str]  # optimizer, packed, variant

EXPERTS = "experts"
# What a cell trains besides the plain objective: settings by dotted name that differ from the configuration's.
VARIANTS: dict[str, dict[str, object]] = {
    "": {},
    "weighted": {},  # tokens have weights of their own, which the samples bring
    "patterns": {
        "parameters.freeze": ["*.0.*"],
        "parameters.groups": [{"match": "*.1.*", "lr": 0.1, "weight_decay": 0.05}],
    },
    "objective": {"model.neftune_alpha": 5.0, "loss.label_smoothing": 0.2, "loss.z_loss": 0.01},
    # More would level the router until rounding decides which experts are chosen.
    EXPERTS: {"loss.router_aux": 0.02},
    "averaging": {"averaging": {"_target_": "sft.training.averaging.ema", "decay": 0.8, "start": 5, "export": True}},
}
# In a quick certificate, by strategy.
FEW = {"deepspeed_zero3": ("patterns", "averaging"), "ddp": ("weighted", EXPERTS), "fsdp2": ("objective",)}


@dataclass(frozen=True)
class Cell:
    """One fit and the tolerances that it is compared with."""

    strategy: str
    num_ranks: int
    accumulation: int
    packed: bool
    resumed: bool
    optimizer: str
    precision: str = "32-true"
    device: str = "cpu"
    variant: str = ""  # one of VARIANTS

    @property
    def key(self) -> Key:
        """What the reference depends on."""
        return self.optimizer, self.packed, self.variant

    @property
    def group(self) -> tuple[int, str]:
        return self.num_ranks, self.strategy

    @property
    def exact(self) -> bool:
        """Whether each weight is compared, instead of all together."""
        return self.precision == "32-true"

    @property
    def tolerance(self) -> float:
        """Of the weights after the last step, whatever rounding does to the reference."""
        if not self.exact:
            return BF16_NOISES
        if self.device == "gpu":
            return GPU_WEIGHT_TOLERANCE
        return WEIGHT_TOLERANCE.get(self.strategy, DEFAULT_WEIGHT_TOLERANCE)

    @property
    def loss_tolerance(self) -> float:
        return LOSS_TOLERANCE if self.exact else BF16_LOSS_TOLERANCE

    def __str__(self) -> str:
        packed = "packed" if self.packed else "unpacked"
        start = "resumed" if self.resumed else "uninterrupted"
        return (
            f"{self.strategy}-{self.num_ranks}ranks-accumulation{self.accumulation}-{packed}-{self.optimizer}-{start}"
            f"{self.variant and f'-{self.variant}'}"
        )


@dataclass(frozen=True)
class CellResult:
    """The largest differences of a cell from the reference; NaN where it gave no numbers.

    For a cell that isn't `exact`, `weight` is the difference of all weights in multiples of the noise.
    """

    cell: Cell
    loss: float = math.nan
    grad_norm: float = math.nan
    weight: float = math.nan
    error: str | None = None
    seconds: float = 0.0
    rounding: float = 0.0  # the reference's, where it was measured

    @property
    def tolerance(self) -> float:
        """Of the weights after the last step."""
        return max(self.cell.tolerance, min(ROUNDINGS * self.rounding, LARGEST_WEIGHT_TOLERANCE))

    @property
    def raised(self) -> bool:
        """Whether rounding raised the tolerance."""
        return self.tolerance > self.cell.tolerance

    @property
    def passed(self) -> bool:
        # NaN is within no tolerance.
        return not self.error and self.loss <= self.cell.loss_tolerance and self.weight <= self.tolerance

    @property
    def may_be_rounding(self) -> bool:
        """Whether it fails, and by so little that its reference's rounding would tell why."""
        could = replace(self, rounding=LARGEST_WEIGHT_TOLERANCE)
        return self.cell.exact and not self.rounding and not self.passed and could.passed

    def document(self) -> dict[str, object]:
        """For JSON, with null for a missing number."""
        differences = {"loss": self.loss, "grad_norm": self.grad_norm, "weight": self.weight}
        return {
            **asdict(self.cell),
            **{f"{name}_difference": value if math.isfinite(value) else None for name, value in differences.items()},
            "loss_tolerance": self.cell.loss_tolerance,
            "weight_tolerance": self.tolerance,
            "passed": self.passed,
            "error": self.error,
            "seconds": round(self.seconds, 2),
        }


def all_cells(
    quick: bool = False,
    precision: str = "32-true",
    device: str = "cpu",
    max_ranks: int = 4,
) -> list[Cell]:
    """All cells: those of one group of ranks together, each resumed cell right after the one that it resumes."""
    cells = []
    for num_ranks, strategy in product((1, 2, 4), STRATEGIES):
        most = 1 if strategy == "single" else max_ranks
        if num_ranks > most or (quick and num_ranks != min(2, most)):
            continue
        for accumulation, packed, optimizer in product((1, 2, 4), (True, False), ("sgd", "adamw")):
            # Quick: two combinations that differ in all three.
            if quick and (accumulation, packed, optimizer) not in ((2, True, "sgd"), (1, False, "adamw")):
                continue
            cells += [
                Cell(strategy, num_ranks, accumulation, packed, resumed, optimizer, precision, device)
                for resumed in (False, True)
            ]
        # SGD, since AdamW's steps don't show by what all gradients are multiplied.
        cells += [
            Cell(strategy, num_ranks, 2, True, resumed, "sgd", precision, device, variant)
            for variant in (FEW.get(strategy, ()) if quick else VARIANTS)
            if variant not in ("", EXPERTS)
            for resumed in ((False, True) if variant == "averaging" else (False,))
        ]
    return cells


def with_experts(cells: list[Cell], quick: bool) -> list[Cell]:
    """The cells of a mixture of experts: for each group of ranks one more, or for one group if `quick`."""
    more = []
    for (_, strategy), group in groupby(cells, lambda cell: cell.group):
        more += list(group)
        if not quick or EXPERTS in FEW.get(strategy, ()):
            more.append(replace(more[-1], accumulation=2, packed=True, resumed=False, optimizer="sgd", variant=EXPERTS))
    return more


@dataclass(frozen=True)
class Outcome:
    """What a cell's ranks return: the metrics of each step, and the path of the last checkpoint."""

    losses: list[float]
    grad_norms: list[float]
    checkpoint: Path


def samples_of(samples: Excerpt, variant: str, seed: int) -> Excerpt:
    """The samples of a cell, weighted or not."""
    return samples.reweighted(seed) if variant == "weighted" else samples


def datamodule(samples: Excerpt, cell: Cell, seed: int) -> SFTDataModule:
    """The samples and steps of a cell."""
    return SFTDataModule(
        samples_of(samples, cell.variant, seed),
        None,
        seed=seed,
        epochs=NUM_STEPS,
        max_steps=NUM_STEPS,
        global_batch_size=GLOBAL_BATCH_SIZE,
        micro_batch_size=GLOBAL_BATCH_SIZE // (cell.num_ranks * cell.accumulation),
        max_length=samples.max_length,
        packing=cell.packed,
        start_step=RESUME_AT if cell.resumed else 0,
    )


def steps(samples: Excerpt, packed: bool, seed: int) -> list[list[int]]:
    """The samples of each step, by number."""
    data = datamodule(samples, Cell("single", 1, 1, packed, False, "sgd"), seed)
    return [np.concatenate(data.step(number).packs).tolist() for number in range(NUM_STEPS)]


def settings_of(variant: str, adapter: bool) -> dict[str, object]:
    """What a variant sets. Beside an adapter nothing is left to freeze."""
    return {name: value for name, value in VARIANTS[variant].items() if not adapter or name != "parameters.freeze"}


def run_cell(config: DictConfig, folder: Path, samples: Excerpt, cell: Cell) -> Outcome:
    """One rank's part of a cell, in a folder of its own in `folder`."""
    config = copy.deepcopy(config)
    config.strategy, config.optimizer = config.strategies[cell.strategy], config.optimizers[cell.optimizer]
    config.trainer.devices = cell.num_ranks
    for name, value in settings_of(cell.variant, bool(config.adapter)).items():
        OmegaConf.update(config, name, value, force_add=True)
    own_folder = folder / str(cell)
    uninterrupted = folder / str(replace(cell, resumed=False)) / "checkpoints"
    file = MetricsFile(own_folder / "metrics.csv")
    fit(
        config,
        model_source(config),
        datamodule(samples, cell, config.seed),
        checkpoints=own_folder / "checkpoints",
        resume=Checkpoint(uninterrupted / f"step-{RESUME_AT:08d}") if cell.resumed else None,
        loggers=[file],
        facts={"seed": config.seed},
    )
    return Outcome(
        [float(row["train/loss"]) for row in file.metrics.rows],
        [float(row["train/grad_norm"]) for row in file.metrics.rows],
        own_folder / "checkpoints" / f"step-{NUM_STEPS:08d}",
    )


def compare(cell: Cell, outcome: Outcome, reference: Reference) -> CellResult:
    """The largest differences; the weights are read from the last checkpoint, so that it is certified too."""
    start = RESUME_AT if cell.resumed else 0
    checkpoint = Checkpoint(outcome.checkpoint)
    if len(outcome.losses) != NUM_STEPS - start:
        return CellResult(cell, error=f"{len(outcome.losses)} steps instead of {NUM_STEPS - start}")
    if checkpoint.shapes.keys() != reference.weights.keys():
        differing = sorted(checkpoint.shapes.keys() ^ reference.weights.keys())
        return CellResult(cell, error=f"the checkpoint holds other parameters: {', '.join(differing[:3])}")
    if reference.movement < LEAST_MOVEMENT:
        return CellResult(cell, error=f"the weights moved by {reference.movement:.1e} only: raise the learning rate")
    ours, averages = [_differences(checkpoint, reference.weights)], reference.averages
    if averages:
        if not checkpoint.has_average:
            return CellResult(cell, error="the checkpoint holds no average of the weights")
        ours.append(_differences(checkpoint, averages, average=True))
    weight = max(np.abs(each).max() if cell.exact else np.linalg.norm(each) / reference.noise for each in ours)
    return CellResult(
        cell,
        loss=_largest_difference(outcome.losses, reference.losses[start:]),
        grad_norm=_largest_difference(outcome.grad_norms, reference.grad_norms[start:]),
        weight=float(weight),
        rounding=reference.rounding,
    )


def _differences(checkpoint: Checkpoint, weights: dict[str, np.ndarray], average: bool = False) -> np.ndarray:
    return np.concatenate(
        [(checkpoint.tensor(name, average).float().numpy() - weight).ravel() for name, weight in weights.items()]
    )


def _largest_difference(ours: list[float], reference: list[float]) -> float:
    return float(np.abs(np.array(ours) - np.array(reference)).max())
