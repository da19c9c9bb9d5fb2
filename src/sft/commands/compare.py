"""sft compare: a table of runs, the lowest final validation loss first, with the settings in which they differ.

  sft compare runs/gsm8k-*
      folders, or names of runs in runs_dir
  sft compare
      all of runs_dir
  sft compare runs/gsm8k-* output=runs.csv
      also writes the table to a file
  sft compare runs/gsm8k-* html=compare.html
      also writes a page with settings, figures, curves and answers side by side; of one run its report

Unfinished and failed runs are shown with the step that they reached; `died` is one whose process is gone, `silent` one
on another machine whose files don't change. Settings that don't change a run's numbers, such as those of the machine,
have no column, nor have those for which the terminal has no room.
"""

import csv
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sft.config.check import shown
from sft.errors import UserError
from sft.runs.files import output_file
from sft.runs.plain import plain
from sft.runs.results import Result, best_first, differing
from sft.runs.run import Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def main(config: DictConfig) -> None:
    path = output_file(config.output, "output") if config.output else None
    html = output_file(config.html, "html") if config.html else None
    names = list(config.runs) or sorted(path.parent.name for path in Path(config.runs_dir).glob("*/config.yaml"))
    if not names:
        raise UserError(f"there are no runs in {config.runs_dir}: name some, or set runs_dir=")
    runs = {run.folder.resolve(): run for run in (Run.find(name, config.runs_dir) for name in names)}
    results = best_first(Result.read(run) for run in runs.values())
    show(results)
    if path:
        write(results, path)
    if html:
        from sft.report import comparison

        comparison.write(results, html)
        print(f"written: {html}")


def show(results: list[Result], console: "Console | None" = None) -> None:
    """Prints the table, with the settings that the console has room for, and why the failed ones failed."""
    from rich.console import Console

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # a log has no width
            console.width = 240
    settings = differing(results)
    figures = list(FIGURES)
    while len(figures) > 2 and width(table(results, figures), console) > console.width:
        figures.remove(next(name for name in FIRST_TO_GO if name in figures))
    chosen: dict[str, str] = {}
    for name, header in settings.items():
        if width(table(results, figures, chosen | {name: header}), console) <= console.width:
            chosen[name] = header
    made = table(results, figures, chosen)
    room, console.width = console.width, max(console.width, width(made, console))  # a cut number is useless
    console.print(made)
    console.width = room
    if left := len(settings) - len(chosen):
        more = "more settings differ" if left > 1 else "more setting differs"
        console.print(f"{left} {more}: sft compare output=runs.csv writes all", soft_wrap=True)
    for result in results:
        if result.error:
            text = plain(f"{result.name} failed: {' '.join(result.error.split())[:300]}")
            console.print(text, markup=False, soft_wrap=True)


FIGURES: dict[str, Callable[[Result], str]] = {
    "run": lambda result: plain(result.name),
    "state": lambda result: result.state,
    "step": lambda result: f"{result.step}/{result.num_steps or '?'}",
    "validation loss": lambda result: _figure(result.last, ".4f"),
    "best": lambda result: _figure(result.best, ".4f"),
    "tokens/s": lambda result: _figure(result.speed, ",.0f"),
}
FIRST_TO_GO = ("tokens/s", "best", "step", "state")
LONGEST = 24  # characters of a setting's value


def table(results: list[Result], figures: Iterable[str], settings: Mapping[str, str] | None = None) -> "Table":
    """Of these figures and settings, the latter with their headers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, header_style="none", show_edge=False, pad_edge=False)
    for column in figures:
        made.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    for column in (settings or {}).values():
        made.add_column(column, justify="right", no_wrap=True)
    for result in results:
        values = [FIGURES[column](result) for column in figures]
        values += [_short(result.settings.get(name)) for name in settings or {}]
        made.add_row(*map(Text, values))  # brackets are no markup
    return made


def width(table: "Table", console: "Console") -> int:
    """The columns of a terminal that the whole table takes."""
    return table.__rich_measure__(console, console.options.update(max_width=100_000)).maximum


def _figure(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _short(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else plain(shown(value))
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[: half - 1]}…{text[-half:]}"


def write(results: list[Result], path: Path) -> None:
    """The table as CSV, with the full names of the settings."""
    settings = differing(results)
    figures = ("name", "state", "step", "num_steps", "last", "best", "speed")
    header = ("run", "state", "step", "num_steps", "val/loss", "best val/loss", "tokens_per_second", *settings)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for result in results:
            values = [getattr(result, figure) for figure in figures]
            writer.writerow([*values, *(result.settings.get(name) for name in settings)])
