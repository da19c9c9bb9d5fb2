"""Reads `metrics.csv` and its figures without torch, so that a table of runs is shown at once."""

import csv
import math
import statistics
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Metrics:
    """The rows of a `metrics.csv`, one a step, each from column to text: empty where nothing was measured."""

    columns: list[str]
    rows: list[dict[str, str]]

    @classmethod
    def read(cls, path: Path) -> "Metrics":
        """All complete rows; none where there is no file."""
        try:
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                # A row cut short by a kill, or still being written, lacks columns: csv gives None for them.
                rows = [row for row in reader if None not in row.values()]
                return cls(list(reader.fieldnames or ()), rows)
        except FileNotFoundError:
            return cls([], [])

    @property
    def step(self) -> int:
        """Of the last row; 0 where there is none."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def values(self, column: str) -> list[float]:
        """What was measured of a metric, oldest first."""
        return [float(row[column]) for row in self.rows if row.get(column)]

    # The figures are NaN where nothing was measured.

    def first(self, column: str) -> float:
        return (self.values(column) or [math.nan])[0]

    def last(self, column: str) -> float:
        return (self.values(column) or [math.nan])[-1]

    def lowest(self, column: str) -> float:
        return min((value for value in self.values(column) if not math.isnan(value)), default=math.nan)

    def median(self, column: str) -> float:
        return statistics.median(self.values(column) or [math.nan])
