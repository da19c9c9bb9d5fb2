"""sft compare: a table of runs, the lowest final validation loss first, with the settings in which they differ.

  sft compare runs/gsm8k-*
      folders, or names of runs in runs_dir
  sft compare
      all of runs_dir
  sft compare runs/gsm8k-* output=runs.csv
      also writes the table to a file

Unfinished and failed runs are shown with the step that they reached. Settings that don't change a run's numbers, such
as those of the machine, have no column.
"""

import csv
import math
from pathlib import Path

from omegaconf import DictConfig

from sft.errors import UserError
from sft.runs.results import Result, best_first, differing
from sft.runs.run import Run


def main(config: DictConfig) -> None:
    names = list(config.runs) or sorted(path.parent.name for path in Path(config.runs_dir).glob("*/config.yaml"))
    if not names:
        raise UserError(f"there are no runs in {config.runs_dir}: name some, or set runs_dir=")
    runs = {run.folder.resolve(): run for run in (Run.find(name, config.runs_dir) for name in names)}
    results = best_first(Result.read(run) for run in runs.values())
    show(results)
    if config.output:
        write(results, Path(config.output))


def show(results: list[Result]) -> None:
    """Prints the table, and why the failed ones failed."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    settings = differing(results)
    table = Table(box=box.SIMPLE_HEAD, header_style="none", show_edge=False, pad_edge=False)
    for column in ("run", "state"):
        table.add_column(column, no_wrap=True)
    for column in ("step", "validation loss", "best", "tokens/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for column in settings.values():
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        table.add_row(
            result.name,
            result.state,
            f"{result.step}/{result.num_steps or '?'}",
            _figure(result.last, ".4f"),
            _figure(result.best, ".4f"),
            _figure(result.speed, ",.0f"),
            *(Text(_short(result.settings.get(name))) for name in settings),  # brackets are no markup
        )
    console = Console(highlight=False)
    if not console.is_terminal:  # a log has no width, and a cut number is useless
        console.width = 240
    console.print(table)
    for result in results:
        if result.error:
            print(f"{result.name} failed: {' '.join(result.error.split())[:300]}")


def _figure(value: float, form: str) -> str:
    return "" if math.isnan(value) else format(value, form)


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


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
