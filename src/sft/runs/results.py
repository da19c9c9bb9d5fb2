"""A run's figures, read from its folder."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sft.runs.identity import deciding
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run


@dataclass(frozen=True)
class Result:
    """A run's state and figures; NaN where nothing was measured."""

    name: str
    settings: dict[str, object]  # those that decide the numbers, by dotted name
    state: str = "new"
    step: int = 0  # the last in `metrics.csv`
    num_steps: int | None = None  # of the whole run; None before its start
    best: float = math.nan  # validation loss
    last: float = math.nan  # validation loss
    speed: float = math.nan  # tokens a second in the median step
    error: str | None = None  # why it failed

    @classmethod
    def read(cls, run: Run) -> "Result":
        status, metrics = run.status, Metrics.read(run.folder / "metrics.csv")
        return cls(
            name=run.folder.name,
            settings=deciding(run.config),
            state=status.get("state", "new"),
            step=metrics.step,
            num_steps=status.get("num_steps"),
            best=metrics.lowest("val/loss"),
            last=metrics.last("val/loss"),
            speed=metrics.median("train/tokens_per_second"),
            error=status.get("error"),
        )


def best_first(results: Iterable[Result]) -> list[Result]:
    """In order of the last validation loss; runs without one at the end."""
    return sorted(results, key=lambda result: (math.isnan(result.last), result.last))


def differing(results: list[Result]) -> dict[str, str]:
    """The settings in which some runs differ, each with the last part of its name, or all where two end alike."""
    names = sorted({name for result in results for name in result.settings})
    varied = [name for name in names if len({repr(result.settings.get(name)) for result in results}) > 1]
    last = {name: name.rpartition(".")[2] for name in varied}
    return {name: name if list(last.values()).count(part) > 1 else part for name, part in last.items()}
