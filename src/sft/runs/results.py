"""A run's figures, read from its folder."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sft.runs.identity import deciding
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run


@dataclass(frozen=True)
class Result:
    """A run's state and figures; NaN where nothing was measured.

    Args:
        state: of `status.json`.
        step: the last in `metrics.csv`.
        num_steps: of the whole run; None before its start.
        best, last: validation losses.
        speed: tokens a second in the median step.
        settings: those that decide the numbers, by dotted name.
        error: why it failed.
    """

    name: str
    settings: dict[str, object]
    state: str = "new"
    step: int = 0
    num_steps: int | None = None
    best: float = math.nan
    last: float = math.nan
    speed: float = math.nan
    error: str | None = None

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
    """The settings in which some runs differ, each with the shortest end of its name that no other of them has."""
    names = sorted({name for result in results for name in result.settings})
    varied = [name for name in names if len({repr(result.settings.get(name)) for result in results}) > 1]
    return {
        name: next(end for end in _ends(name) if sum(end in _ends(other) for other in varied) == 1) for name in varied
    }


def _ends(name: str) -> list[str]:
    """`a.b.c` → `c`, `b.c`, `a.b.c`"""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts)))]
