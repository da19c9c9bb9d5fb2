"""All metrics of a run: name, unit, formula, and where each is computed. docs/metrics.md is made of this table."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A column of metrics.csv, which trackers have under the same name."""

    name: str  # a part in braces is any text: val/loss/{set}
    unit: str
    formula: str
    where: str  # the file in src/sft that computes it
    best: Literal["min", "max"] | None = None  # None: neither is better
    of_machine: bool = False  # differs between two runs of the same numbers


METRICS = (
    Metric(
        "train/loss",
        "nats a token",
        "Σ w · (−log p) over the step's supervised tokens / Σ w; w is 1 unless the data have weights",
        "training/metrics.py",
        "min",
    ),
    Metric("train/label_smoothing", "nats a token", "what label smoothing adds to it", "training/metrics.py"),
    Metric("train/z_loss", "nats a token", "what z-loss adds to it", "training/metrics.py"),
    Metric("train/router_aux", "a token", "what the experts' load-balancing loss adds to it", "training/metrics.py"),
    Metric(
        "train/expert_load_max",
        "ratio",
        "largest share of a layer's tokens that one expert has / (1 / number of experts)",
        "training/metrics.py",
    ),
    Metric(
        "train/lr", "", "learning rate of this step, of the parameters that no pattern matches", "training/module.py"
    ),
    Metric("train/grad_norm", "", "‖gradient‖₂ over all trained parameters, before clipping", "model/optimizer.py"),
    Metric("train/grad_norm_clipped", "", "‖gradient‖₂ after clipping", "model/optimizer.py"),
    Metric("train/supervised_share", "share", "the step's supervised tokens / its tokens", "training/metrics.py"),
    Metric("train/pack_fill", "share", "the step's tokens / (its packs · length of a pack)", "training/metrics.py"),
    Metric(
        "train/tokens_per_second",
        "tokens/s",
        "the step's tokens on all ranks / seconds from its first micro-batch to its end",
        "training/metrics.py",
        of_machine=True,
    ),
    Metric(
        "val/loss",
        "nats a token",
        "Σ w · (−log p) over all supervised validation tokens / Σ w",
        "training/module.py",
        "min",
    ),
    Metric(
        "val/loss/{set}",
        "nats a token",
        "the same over the set of that name in `data.val_path`",
        "training/module.py",
        "min",
    ),
    Metric(
        "val/loss_average", "nats a token", "val/loss with the average of the weights", "training/averaging.py", "min"
    ),
    Metric("val/perplexity", "", "exp(val/loss)", "training/metrics.py", "min"),
    Metric(
        "answers/score",
        "0 to 1",
        "mean over the held-out prompts of `evaluation.scorer` of (answer, reference)",
        "evaluation/scorers.py",
        "max",
    ),
    Metric(
        "answers/exact",
        "share",
        "answers that are the reference, but for space around them / answers",
        "evaluation/scorers.py",
        "max",
    ),
    Metric(
        "answers/base_score",
        "0 to 1",
        "answers/score of the model before training, on the same prompts",
        "evaluation/scorers.py",
    ),
    Metric("answers/stopped", "share", "answers that end with a stop token / answers", "evaluation/scorers.py", "max"),
    Metric(
        "answers/length_ratio",
        "ratio",
        "Σ tokens of the answers / Σ tokens of their references; of an answer that was cut, its reference counts as "
        "far as the answer reaches",
        "evaluation/scorers.py",
    ),
)


def find(column: str) -> Metric | None:
    """The metric of a column, by its exact name or else by a pattern."""
    exact = (metric for metric in METRICS if metric.name == column)
    return next(exact, None) or next((metric for metric in METRICS if _pattern(metric.name).fullmatch(column)), None)


def timings(columns: Iterable[str]) -> list[str]:
    """Those that differ between two runs of the same numbers."""
    return [column for column in columns if (metric := find(column)) and metric.of_machine]


def page() -> str:
    """The table of docs/metrics.md."""
    rows = [
        f"| `{metric.name}` | {metric.unit} | {metric.formula} | [{metric.where}](../src/sft/{metric.where}) |"
        for metric in METRICS
    ]
    return "\n".join(["| name | unit | formula | where |", "|---|---|---|---|", *rows])


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(name)))
