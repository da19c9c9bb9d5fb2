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


# Below these a model doesn't stop where its references do: val/stop_recall, val/expected_length.
LEAST_RECALL, LEAST_LENGTH = 0.5, 0.8

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
        "train/lr", "", "learning rate of this step, of the parameters that no pattern matches", "training/metrics.py"
    ),
    Metric(
        "train/lr/{pattern}",
        "",
        "that of the parameters that this pattern of `parameters.groups` matches, where it is another",
        "training/metrics.py",
    ),
    Metric("train/grad_norm", "", "‖gradient‖₂ over all trained parameters, before clipping", "model/optimizer.py"),
    Metric("train/grad_norm_clipped", "", "‖gradient‖₂ after clipping", "model/optimizer.py"),
    Metric(
        "train/clipped",
        "0 or 1",
        "whether train/grad_norm was above `trainer.gradient_clip_val` or, clipping by value, some value was",
        "training/metrics.py",
    ),
    Metric(
        "train/clipped_share",
        "share",
        "clipped steps / steps so far, those of a run that this one extends with them",
        "training/metrics.py",
    ),
    Metric(
        "train/weight_norm/{layers}",
        "",
        "‖weights‖₂ after the step, of the group's trained parameters; every `evaluation.layers_every` steps",
        "training/layers.py",
    ),
    Metric(
        "train/update_ratio/{layers}",
        "ratio",
        "‖weights after the step − before it‖₂ / ‖weights‖₂, of the same",
        "training/layers.py",
    ),
    Metric("train/supervised_share", "share", "the step's supervised tokens / its tokens", "training/metrics.py"),
    Metric("train/pack_fill", "share", "the step's tokens / (its packs · length of a pack)", "training/metrics.py"),
    Metric(
        "train/tokens",
        "tokens",
        "Σ tokens of all steps so far, on all ranks, those of a run that this one extends with them",
        "training/datamodule.py",
    ),
    Metric("train/supervised_tokens", "tokens", "the supervised ones of these", "training/datamodule.py"),
    Metric("train/epoch", "epochs", "train/tokens / tokens of all training samples", "training/metrics.py"),
    Metric(
        "train/tokens_per_second",
        "tokens/s",
        "the step's tokens on all ranks / train/seconds",
        "training/speed.py",
        of_machine=True,
    ),
    Metric(
        "train/seconds",
        "s",
        "from when the step's first batch is asked for until its values are read, on the first rank",
        "training/speed.py",
        of_machine=True,
    ),
    Metric(
        "train/data_wait",
        "share",
        "seconds until the step's batches were made / train/seconds, of the rank that waited longest",
        "training/speed.py",
        of_machine=True,
    ),
    Metric(
        "train/memory_peak",
        "GiB",
        "most memory so far, of the rank with most: tensors on its GPU or, without one, the process",
        "training/speed.py",
        of_machine=True,
    ),
    Metric(
        "train/mfu",
        "share",
        "useful operations of the step / train/seconds / (peak of a device · ranks); known devices only",
        "model/flops.py",
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
        "val/accuracy",
        "share",
        "Σ w · [most probable token = the token] / Σ w over all supervised validation tokens",
        "evaluation/responses.py",
        "max",
    ),
    Metric(
        "val/loss_by_source/{source}",
        "nats a token",
        "val/loss over the samples of one source, where there are several",
        "evaluation/responses.py",
        "min",
    ),
    Metric(
        "val/loss_by_length/{range}",
        "nats a token",
        "val/loss over the responses of so many supervised tokens, where they are in several ranges",
        "evaluation/responses.py",
        "min",
    ),
    Metric(
        "val/loss_by_turn/{turn}",
        "nats a token",
        "val/loss over the first, second, ... response of each sample, where there are several",
        "evaluation/responses.py",
        "min",
    ),
    Metric(
        "val/stop_prob",
        "share",
        "mean of p_n over the responses that end in a stop token; p_t: probability of the stop tokens at a response's "
        "token t = 1 ... n, given the reference before it",
        "evaluation/responses.py",
        "max",
    ),
    Metric(
        "val/stop_recall",
        "share",
        "share of these responses at whose end a stop token is the most probable token",
        "evaluation/responses.py",
        "max",
    ),
    Metric(
        "val/stop_early",
        "share",
        "mean over these responses of 1 − Π_(t<n) (1 − p_t): how probable a stop before the end is",
        "evaluation/responses.py",
        "min",
    ),
    Metric(
        "val/expected_length",
        "ratio",
        "mean over these responses of (1/n) Σ_t Π_(s<t) (1 − p_s): expected length up to the reference's end / its "
        "length",
        "evaluation/responses.py",
        "max",
    ),
    Metric(
        "val/gain",
        "nats a token",
        "Σ d / Σ w over the validation samples; d: a sample's Σ w · (−log p) before training less that of now",
        "evaluation/base.py",
        "max",
    ),
    Metric(
        "val/gain_error",
        "nats a token",
        "standard error of val/gain: √(n/(n − 1) · Σ (d − gain · w)²) / Σ w over the n samples",
        "evaluation/base.py",
    ),
    Metric(
        "val/kl_base",
        "nats a token",
        "mean of Σ_v p_v (log p_v − log q_v) over `evaluation.kl_tokens` fixed tokens; p before training, q now",
        "evaluation/validation_pass.py",
    ),
    Metric(
        "val/base_tokens_loss",
        "nats a token",
        "mean of −log p over the same fixed tokens, of prompts and responses",
        "evaluation/validation_pass.py",
    ),
    Metric(
        "val/general_loss",
        "nats a token",
        "mean of −log p over all tokens of `evaluation.text`",
        "training/validation.py",
        "min",
    ),
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
