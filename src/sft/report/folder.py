"""What a report is made of: the files of a run's folder, any of which may be missing, cut short or of older code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from sft.runs import answers_file, events
from sft.runs.answers_file import Answer
from sft.runs.events import Event
from sft.runs.results import state
from sft.runs.run import Run

Columns = dict[str, NDArray[np.float64]]  # of metrics.csv: a value a row, NaN where nothing was measured


@dataclass(frozen=True)
class Folder:
    """All that a run has written, empty where it hasn't."""

    run: Run
    state: str
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    ledger: Mapping[str, Any]
    recipe: Mapping[str, Any]
    verified: Mapping[str, Any]  # what the export was found to be
    columns: Columns
    events: list[Event]
    answers: list[Answer]  # oldest first

    @classmethod
    def read(cls, folder: Path, status: Mapping[str, Any] | None = None) -> "Folder":
        """`status`: what will be in status.json and is not yet."""
        run, ahead = Run(folder), status or {}
        return cls(
            run=run,
            state=ahead.get("state") or _or("new", lambda: state(run)),
            status={**_json(folder / "status.json"), **ahead},
            config=_config(folder / "config.yaml"),
            provenance=_json(folder / "provenance.json"),
            ledger=_json(folder / "data.json"),
            recipe=_json(folder / "recipe.json"),
            verified=_json(folder / "export" / "verified.json"),
            columns=read_columns(folder / "metrics.csv"),
            events=events.read(folder),
            answers=answers_file.read(folder),
        )

    @property
    def name(self) -> str:
        return self.run.folder.name

    @property
    def running(self) -> bool:
        return self.state == "running"

    @property
    def step(self) -> int:
        """The last in metrics.csv."""
        return int(self.columns["step"][-1]) if len(self.columns["step"]) else 0

    def points(self, column: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The steps at which a metric was measured, and its values."""
        values = self.columns.get(column)
        if values is None:
            return np.empty(0), np.empty(0)
        measured = ~np.isnan(values)
        return self.columns["step"][measured], values[measured]

    def last(self, column: str, step: int | None = None) -> float | None:
        """The value at a step, or else the last one; None where nothing was measured."""
        steps, values = self.points(column)
        if step is not None and (steps == step).any():
            return float(values[steps == step][-1])
        return float(values[-1]) if len(values) else None

    def first(self, column: str) -> float | None:
        _, values = self.points(column)
        return float(values[0]) if len(values) else None


def read_columns(path: Path) -> Columns:
    """The columns of a metrics.csv, `step` among them. A last row that is still being written is left out.

    pyarrow takes a second for the rows of a million steps, for which the csv module takes ten.
    """
    from pyarrow import BufferReader, csv, float64, py_buffer

    try:
        written = path.read_bytes()
    except FileNotFoundError:
        written = b""
    names = written[: written.find(b"\n") + 1].decode(errors="replace").rstrip().split(",")
    complete = memoryview(written)[: written.rfind(b"\n") + 1]
    if "step" not in names or written.count(b"\n", 0, 100_000) < 2:
        return {"step": np.empty(0)}
    table = csv.read_csv(
        BufferReader(py_buffer(complete)),
        parse_options=csv.ParseOptions(invalid_row_handler=lambda row: "skip"),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, float64()), null_values=[""]),
    )
    return {name: np.asarray(table[name].to_numpy(), np.float64) for name in table.column_names}


def _json(path: Path) -> Mapping[str, Any]:
    value = _or({}, lambda: json.loads(path.read_text()))
    return value if isinstance(value, dict) else {}


def _config(path: Path) -> Mapping[str, Any]:
    value = _or({}, lambda: yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    return value if isinstance(value, dict) else {}


def _or(otherwise: Any, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return otherwise
