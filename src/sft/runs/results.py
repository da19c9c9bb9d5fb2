"""What became of a run, read from its folder: nothing heavy is imported, so that a table of runs is there at once."""

import csv
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sft.runs.run import Run, deciding


@dataclass(frozen=True)
class Result:
    """A run's figures; NaN where nothing was measured.

    Args:
        state: of `status.json`.
        step: the last in `metrics.csv`.
        num_steps: of the whole run; None before it has begun.
        best, last: validation losses.
        speed: tokens a second in the median step.
        settings: those that decide the numbers, by dotted name.
        error: why it failed.
    """

    name: str
    settings: dict[str, Any]
    state: str = "new"
    step: int = 0
    num_steps: int | None = None
    best: float = math.nan
    last: float = math.nan
    speed: float = math.nan
    error: str | None = None

    @classmethod
    def read(cls, run: Run) -> "Result":
        status, rows = run.status, _rows(run)
        losses = _column(rows, "val/loss")
        return cls(
            name=run.folder.name,
            settings=deciding(run.config),
            state=status.get("state", "new"),
            step=int(rows[-1]["step"]) if rows else 0,
            num_steps=status.get("num_steps"),
            best=min((loss for loss in losses if not math.isnan(loss)), default=math.nan),
            last=losses[-1] if losses else math.nan,
            speed=statistics.median(_column(rows, "train/tokens_per_second") or [math.nan]),
            error=status.get("error"),
        )


def best_first(results: Iterable[Result]) -> list[Result]:
    """By the last validation loss; those without one are at the end."""
    return sorted(results, key=lambda result: (math.isnan(result.last), result.last))


def differing(results: list[Result]) -> dict[str, str]:
    """The settings in which some runs differ, each with the shortest end of its name that no other one has."""
    names = sorted({name for result in results for name in result.settings})
    varied = [name for name in names if len({repr(result.settings.get(name)) for result in results}) > 1]
    return {
        name: next(end for end in _ends(name) if sum(end in _ends(other) for other in varied) == 1) for name in varied
    }


def _ends(name: str) -> list[str]:
    """`a.b.c` → `c`, `b.c`, `a.b.c`"""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts)))]


def _rows(run: Run) -> list[dict[str, str]]:
    try:
        with (run.folder / "metrics.csv").open(newline="") as file:
            # A run that is being trained may have written half a row: csv gives None for what it lacks.
            return [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return []


def _column(rows: list[dict[str, str]], name: str) -> list[float]:
    return [float(row[name]) for row in rows if row.get(name)]
