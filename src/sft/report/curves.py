"""Which metrics share a chart, and how a million steps become a thousand points without losing a spike."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.report.folder import Folder
from sft.report.html import escaped, visible
from sft.runs.metric import find

POINTS = 60_000  # of all series together
MOST_MARKS = 30  # of a run
MOST_SERIES = 12  # of a chart; its palette has 8 colours and 2 dashes
SMOOTHED = ("loss", "grad_norm", "grad_norm_clipped", "tokens_per_second", "mfu", "data_wait", "seconds")  # of train/
# By what the steps can be replaced on the x-axis: its label, the column, and by what that is divided.
AXES = {
    "tokens": ("tokens", "train/tokens", 1.0),
    "supervised": ("supervised tokens", "train/supervised_tokens", 1.0),
    "epoch": ("epochs", "train/epoch", 1.0),
    "hours": ("hours of training steps", "train/seconds", 3600.0),  # summed up
}


@dataclass(frozen=True)
class Chart:
    title: str
    columns: tuple[str, ...]  # or patterns, * being anything
    wide: bool = False


GROUPS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("Loss", ("train/loss", "val/loss", "val/loss_average"), wide=True),
        Chart("Validation loss by set", ("val/loss/*",)),
        Chart("Validation loss by source", ("val/loss_by_source/*",)),
        Chart("Validation loss by length of the response", ("val/loss_by_length/*",)),
        Chart("Validation loss by turn", ("val/loss_by_turn/*",)),
        Chart("Score of the answers", ("answers/score", "answers/base_score", "answers/exact")),
        Chart("Token accuracy", ("val/accuracy",)),
        Chart("Perplexity", ("val/perplexity",)),
        Chart("Gain over the base, ± standard error", ("val/gain",)),
    ),
    "Stopping": (
        Chart("Stop token", ("val/stop_prob", "val/stop_recall", "val/stop_early", "answers/stopped")),
        Chart("Length over the reference's", ("val/expected_length", "answers/length_ratio")),
    ),
    "Forgetting": (
        Chart("KL to the base model", ("val/kl_base",)),
        Chart("Loss on text that isn't trained", ("val/base_tokens_loss", "val/general_loss")),
    ),
    "Optimization": (
        Chart("Learning rate", ("train/lr", "train/lr/*")),
        Chart("Gradient norm", ("train/grad_norm", "train/grad_norm_clipped")),
        Chart("Clipped steps", ("train/clipped_share",)),
        Chart("Relative update by layers", ("train/update_ratio/*",)),
        Chart("Norm of the weights by layers", ("train/weight_norm/*",)),
        Chart("Added to the loss", ("train/label_smoothing", "train/z_loss", "train/router_aux")),
        Chart("Load of the busiest expert", ("train/expert_load_max",)),
    ),
    "Machine": (
        Chart("Throughput", ("train/tokens_per_second",)),
        Chart("MFU", ("train/mfu",)),
        Chart("Peak memory", ("train/memory_peak",)),
        Chart("Waiting for data", ("train/data_wait",)),
        Chart("Time of a step", ("train/seconds",)),
        Chart("Fill of the packs and supervised share", ("train/pack_fill", "train/supervised_share")),
    ),
}
OTHER = "Other metrics"
NO_CURVES = ("step", "train/tokens", "train/supervised_tokens", "train/epoch", "train/clipped", "val/gain_error")
ERRORS = {"val/gain": "val/gain_error"}


def assigned(columns: Sequence[str]) -> dict[str, list[tuple[Chart, list[str]]]]:
    """Each group's charts with the columns that they show; each column in one chart."""
    left = [column for column in columns if column not in NO_CURVES]
    groups: dict[str, list[tuple[Chart, list[str]]]] = {}
    for group, charts in GROUPS.items():
        for chart in charts:
            shown = [name for pattern in chart.columns for name in left if fnmatch.fnmatchcase(name, pattern)]
            if shown := list(dict.fromkeys(shown)):
                left = [column for column in left if column not in shown]
                groups.setdefault(group, []).append((chart, shown))
    if left:
        groups[OTHER] = [(Chart(column, (column,)), [column]) for column in left[:MOST_SERIES]]
    return groups


def measured(folder: Folder) -> list[str]:
    return [name for name, values in folder.columns.items() if np.isfinite(values).any()]


class Plot:
    """Collects charts, and the data that charts.js draws them of."""

    def __init__(self, folders: Sequence[Folder]) -> None:
        self.folders = folders
        self.series: list[tuple[dict[str, Any], int, NDArray[np.float64], NDArray[np.float64]]] = []
        self.charts: list[dict[str, Any]] = []

    def chart(self, title: str, columns: Mapping[str, str], unit: str, wide: bool = False) -> str:
        """A chart's place on the page. `columns`: each with the label of its curve.

        With one run each column is a curve; with several each run is one, so columns should be one.
        """
        made: dict[str, Any] = {"title": title, "unit": unit, "series": []}
        several = len(self.folders) > 1
        for run, folder in enumerate(self.folders):
            for at, (column, label) in enumerate(list(columns.items())[:MOST_SERIES]):
                steps, values = folder.points(column)
                if not len(values):
                    continue
                name, colour = (folder.name, run) if several else (label, at)
                series = {"name": name, "run": run, "colour": colour}
                window = len(values) // 50
                if column.removeprefix("train/") in SMOOTHED and window > 1:
                    self._add(made, {**series, "kind": "raw"}, steps, values)
                    mean = {**series, "name": f"{name}, mean of {window:,}", "kind": "line"}
                    self._add(made, mean, steps, trailing_mean(values, window))
                else:
                    if error := ERRORS.get(column):
                        series["error"] = dict(zip(*(part.tolist() for part in folder.points(error)), strict=True))
                    kind = "dots" if len(values) <= (25 if column.startswith("train/") else 80) else "line"
                    self._add(made, {**series, "kind": kind}, steps, values)
        self.charts.append(made)
        left = len(columns) - MOST_SERIES
        notes = [f"{left} more in metrics.csv"] if left > 0 else []
        metric = find(next(iter(columns)))
        formula = metric.formula if metric else ""
        about = "; ".join([*notes, *([formula] if formula else [])])
        return (
            f'<figure class="chart{" wide" if wide else ""}" data-chart="{len(self.charts) - 1}">'
            f"<figcaption><b>{escaped(title)}</b> <span>{escaped(unit)}</span>"
            f'<small title="{escaped(about)}">{escaped(about)}</small></figcaption></figure>'
        )

    def _add(self, chart: dict[str, Any], series: dict[str, Any], x: NDArray[Any], y: NDArray[Any]) -> None:
        self.series.append((series, int(series["run"]), x, y))
        chart["series"].append(series)

    def data(self) -> dict[str, Any]:
        """For charts.js. A point's x is the place of its step in the run's list of steps; the other axes have a value
        for each of those steps, too, so that every point is exact by each."""
        buckets = max(20, POINTS // (2 * max(1, len(self.series))))
        marks = [_marks(folder) for folder in self.folders]
        used: list[set[int]] = [set(of_run) for of_run in marks]
        thinned = []
        for series, run, steps, values in self.series:
            kept = spread(values, buckets)
            thinned.append((series, run, steps[kept], values[kept]))
            used[run].update(int(step) for step in steps[kept])
        runs = [self._axes(folder, sorted(steps)) for folder, steps in zip(self.folders, used, strict=True)]
        places = [{step: at for at, step in enumerate(run["step"])} for run in runs]
        for series, run, steps, values in thinned:
            if "error" in series:
                series["error"] = [rounded(series["error"].get(step, math.nan)) for step in steps.tolist()]
            series["x"] = [places[run][int(step)] for step in steps]
            series["y"] = [rounded(value) for value in values.tolist()]
        shared = [key for key in AXES if all(key in run for run in runs)]
        axes = [["step", "step"], *([key, AXES[key][0]] for key in shared)]
        for axes_of_run, of_run, place in zip(runs, marks, places, strict=True):
            axes_of_run["marks"] = [[place[step], text] for step, text in of_run.items()]
        return {"axes": axes, "runs": runs, "charts": self.charts}

    def _axes(self, folder: Folder, steps: list[int]) -> dict[str, Any]:
        axes: dict[str, Any] = {"step": steps}
        for key, (_, column, unit) in AXES.items():
            known, values = folder.points(column)
            if key == "hours":
                values = np.cumsum(values)
            if len(known):  # step 0, before training, has no row of training
                known, values = np.append(0.0, known), np.append(0.0, values)
                axes[key] = [rounded(value, 7) for value in (np.interp(steps, known, values) / unit).tolist()]
        return axes


def _marks(folder: Folder) -> dict[int, str]:
    """Steps after which something happened that a curve may show."""
    found: dict[int, str] = {}
    for event in folder.events:
        step = event.get("step")
        if isinstance(step, int) and event["event"] == "start" and step:
            found[step] = f"resumed after step {step:,}"
        elif isinstance(step, int) and event["event"] == "alert":
            found[step] = f"step {step:,}: {visible(event.get('title') or 'alert')}"
    return dict(list(found.items())[-MOST_MARKS:])


def page(plot: Plot, groups: Mapping[str, list[tuple[Chart, list[str]]]]) -> str:
    """The groups' charts, for one run."""
    parts = []
    for group, charts in groups.items():
        figures = ""
        for chart, columns in charts:
            one_family = len(chart.columns) == 1 and chart.columns[0].endswith("/*")
            labels = {name: name.rpartition("/")[2] if one_family else name for name in columns}
            figures += plot.chart(chart.title, labels, unit(columns[0]), chart.wide)
        parts.append(f"<h3>{escaped(group)}</h3><div class='charts'>{figures}</div>")
    return "".join(parts)


def unit(column: str) -> str:
    metric = find(column)
    return metric.unit if metric else ""


def spread(values: NDArray[np.float64], buckets: int) -> NDArray[np.int64]:
    """The places of the points to draw: of each bucket of neighbours the lowest and the highest, in their order, and
    the first and the last of all. Every point where there are no more than that."""
    if len(values) <= 2 * buckets + 2:
        return np.arange(len(values))
    size = -(-len(values) // buckets)
    padded = np.full(size * buckets, np.nan)
    padded[: len(values)] = values
    rows = padded.reshape(buckets, size)
    finite, first = np.isfinite(rows), size * np.arange(buckets)
    some = finite.any(1)
    lowest = (first + np.where(finite, rows, np.inf).argmin(1))[some]
    highest = (first + np.where(finite, rows, -np.inf).argmax(1))[some]
    gaps = (first + finite.argmin(1))[~finite.all(1)]  # they, too, are something to be seen
    kept = np.unique(np.concatenate([[0, len(values) - 1], lowest, highest, gaps]))
    return kept[kept < len(values)]


def trailing_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Of each value and the `window` − 1 before it, or as many as there are; those that are no numbers left out."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    before = np.arange(len(values)) - window
    earlier = before >= 0
    sums = sums - np.where(earlier, sums[before.clip(0)], 0.0)
    counts = counts - np.where(earlier, counts[before.clip(0)], 0)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def rounded(value: float, digits: int = 6) -> float | None:
    """To so many significant digits; None, which JSON has, for what is no number."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
