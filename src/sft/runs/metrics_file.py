"""Reads `metrics.csv` and its figures without torch, so that a table of runs is shown at once."""

import csv
import json
import math
import statistics
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from xxhash import xxh3_128

from sft.runs.metric import timings

BLOCK, MOST = 8 * 1024, 4 * 1024 * 1024  # bytes that are read at once: at first, and at most
KEPT = 256  # bytes by which a file is known to be the one that was read before


@dataclass
class Metrics:
    """The rows of a `metrics.csv`, one a step, each from column to text: empty where nothing was measured."""

    columns: list[str]
    rows: list[dict[str, str]]
    num_lost: int = 0  # whole lines that are no rows

    @classmethod
    def read(cls, path: Path) -> "Metrics":
        """All complete rows, each a later step than the one before; none where there is no file, or none of ours. What
        is cut short by a kill, still being written or damaged is left out."""
        rows: list[dict[str, str]] = []
        with suppress(FileNotFoundError, csv.Error), path.open(newline="", errors="replace") as file:
            reader = csv.DictReader(line for line in file if line.endswith("\n"))
            columns = list(reader.fieldnames or ())
            if "step" not in columns or len({*columns}) < len(columns):
                return cls([], [], len(list(reader)) + bool(columns))
            num_lost = 0
            for row in reader:
                if _is_whole(row) and int(row["step"]) > (int(rows[-1]["step"]) if rows else -1):
                    rows.append(row)
                else:
                    num_lost += 1
            return cls(columns, rows, num_lost)
        return cls([], [])

    @property
    def step(self) -> int:
        """Of the last row; 0 where there is none."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    def digest(self, step: int) -> str:
        """Of the rows before `step`, whose own row may still get a validation's columns, in hexadecimal digits. Without
        the machine's times, so that a resumed run has what an uninterrupted one has."""
        digest, of_machine = xxh3_128(), timings(self.columns)
        for row in self.rows:
            if int(row["step"]) < step:
                kept = sorted((name, value) for name, value in row.items() if value and name not in of_machine)
                digest.update(json.dumps(kept).encode())
        return digest.hexdigest()

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


def _is_whole(row: Mapping[str, str] | Mapping[str | None, object]) -> bool:
    """Whether it has all columns, of numbers; csv gives None for one that it lacks, and for the name of one more."""
    if None in row or None in row.values() or not str(row["step"]).isdecimal():
        return False
    try:
        return all(value == "" or isinstance(float(str(value)), float) for value in row.values())
    except ValueError:
        return False


def end(path: Path, wanted: str) -> Metrics:
    """The last complete rows, so few that a large file takes no longer: from one with the column `wanted` on, if there
    is one in the last `MOST` bytes."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return Metrics([], [])
    with file:
        first = file.readline()
        columns, size, length = _columns(first), file.seek(0, 2), BLOCK
        if "step" not in columns or len({*columns}) < len(columns):
            return Metrics([], [])
        while True:
            start = max(len(first), size - length)
            file.seek(start)
            lines = _whole(file.read(size - start))
            if start > len(first):
                lines = lines[1:]  # the first is the end of one
            rows = [dict(zip(columns, row, strict=True)) for row in _rows(lines, len(columns))]
            rows = [row for row in rows if _is_whole(row)]
            if start == len(first) or length >= MOST or any(row.get(wanted) for row in rows):
                return Metrics(columns, rows)
            length *= 4


@dataclass
class Curve:
    """What was measured of a metric, and at which steps."""

    steps: "array[int]" = field(default_factory=lambda: array("q"))
    values: "array[float]" = field(default_factory=lambda: array("d"))


class Following:
    """The curves of a `metrics.csv` that is being written: each `read` takes what is new.

    A validation's values go into the last row, and a run that resumes begins with an earlier row: the file is then
    written anew. So the last row is read again each time, and all of them where anything before it has changed.
    """

    def __init__(self, path: Path, wanted: Iterable[str]) -> None:
        self.path, self.wanted = path, tuple(wanted)
        self._forget(b"")

    def _forget(self, first: bytes) -> None:
        self.columns = _columns(first)
        self.curves = {name: Curve() for name in self.wanted}
        self.step = 0  # of the last row
        self._first = self._before = first  # the first line, and what stands before the last row
        self._row, self._at = b"", len(first)  # the last row and where it begins

    def read(self) -> bool:
        """Whether anything is new."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return False
        with file:
            if again := not self._continues(file):
                file.seek(0)
                self._forget(file.readline())
            before = self._at, self._row
            self._drop_last()
            file.seek(self._at)
            begin = self._at
            while block := file.read(MOST):
                lines = _whole(block + file.readline())
                self._take(lines)
                if lines:
                    self._row, self._at = lines[-1], begin + sum(map(len, lines[:-1]))
                    begin = self._at + len(self._row)
            file.seek(max(0, self._at - KEPT))
            self._before = file.read(self._at - file.tell())
        return again or before != (self._at, self._row)

    def _continues(self, file: BinaryIO) -> bool:
        """Whether what was read before is still there, and the last row as it was or longer."""
        file.seek(max(0, self._at - len(self._before)))
        if not self._row or file.read(len(self._before)) != self._before or not file.read(1):
            return False
        file.seek(0)
        return file.read(len(self._first)) == self._first

    def _drop_last(self) -> None:
        with suppress(ValueError):  # from a line that is damaged no value came
            for row in _rows([self._row], len(self.columns)):
                step = int(row[0])
                for curve in self.curves.values():
                    if curve.steps and curve.steps[-1] == step:
                        curve.steps.pop()
                        curve.values.pop()

    def _take(self, lines: list[bytes]) -> None:
        places = [(self.columns.index(name), curve) for name, curve in self.curves.items() if name in self.columns]
        for row in _rows(lines, len(self.columns)):
            with suppress(ValueError):
                self.step = int(row[0])
                for place, curve in places:
                    if row[place]:
                        curve.values.append(float(row[place]))
                        curve.steps.append(self.step)


def _columns(first: bytes) -> list[str]:
    try:
        return next(csv.reader([first.decode(errors="replace")]), [])
    except csv.Error:
        return []


def _whole(block: bytes) -> list[bytes]:
    """The lines that are whole: neither cut short by a kill nor still being written."""
    lines = block.splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _rows(lines: list[bytes], width: int) -> Iterator[list[str]]:
    text = b"".join(lines).decode(errors="replace")
    return (row for row in (line.split(",") for line in text.split("\n")) if len(row) == width)
