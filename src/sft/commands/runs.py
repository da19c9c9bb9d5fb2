"""sft runs: a table of all runs, the newest first: state, steps, time left or taken, validation loss, host, job.

  sft runs
      all of runs_dir
  sft runs 'gsm8k-*' runs/demo
      names, patterns of names, folders
  sft runs state=running
      those in one state: running, queued, starting, interrupted, failed, died, silent, finished, new or unreadable

`died` is a run whose process is gone, `silent` one on another machine whose files don't change; `queued` and `starting`
come from Slurm, where there is one. sft compare shows figures and settings, sft watch follows a run.
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sft.cluster.slurm import queue_if_known
from sft.cluster.time_limit import clock
from sft.commands.compare import width
from sft.errors import UserError
from sft.report.progress import Progress, find
from sft.report.screen import plain, shade
from sft.runs.results import duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PATIENCE = 3.0  # seconds for Slurm to answer


def main(config: DictConfig) -> None:
    jobs = queue_if_known(PATIENCE)
    folders = find([config.run] if isinstance(config.run, str) else config.run or (), config.runs_dir, jobs)
    found = [Progress.read(folder, jobs) for folder in folders]
    wanted = [run for run in found if config.state in (None, run.state.partition(" ")[0])]
    if not found:
        raise UserError(f"there are no runs in {config.runs_dir}: set runs_dir=")
    if not wanted:
        print(f"no run is {config.state}")
    else:
        show(wanted)


def show(runs: Iterable[Progress], console: "Console | None" = None) -> None:
    """Prints the table, with the columns that the console has room for, and why runs failed."""
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # a log has no width
            console.width = 240
    runs = sorted(runs, key=lambda run: math.inf if math.isnan(run.changed) else run.changed, reverse=True)
    columns = [name for name in COLUMNS if any(COLUMNS[name](run) for run in runs)]
    for name in FIRST_TO_GO:
        if name in columns and width(table(runs, columns), console) > console.width:
            columns.remove(name)
    made = table(runs, columns)
    room, console.width = console.width, max(console.width, width(made, console))  # a cut number is useless
    console.print(made)
    console.width = room
    for run in runs:
        if run.error:
            text = f"{run.folder.name} {run.state}: {' '.join(run.error.split())[:300]}"
            console.print(Text(plain(text)), soft_wrap=True)


COLUMNS: dict[str, Callable[[Progress], str]] = {
    "run": lambda run: plain(run.folder.name),
    "state": lambda run: run.state,
    "step": lambda run: f"{run.step}/{run.num_steps or '?'}",
    "time": lambda run: "" if math.isnan(run.taken) else clock(run.taken),
    "left": lambda run: "" if math.isnan(run.left) else clock(run.left),
    "validation loss": lambda run: "" if math.isnan(run.val_loss) else format(run.val_loss, ".4f"),
    "host": lambda run: plain(hosts(run.hosts)),
    "job": lambda run: str(run.job or ""),
    "changed": lambda run: "" if math.isnan(run.changed) else ago(time.time() - run.changed),
}
FIRST_TO_GO = ("job", "time", "host", "changed", "validation loss", "left", "step")


def table(runs: Iterable[Progress], columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, header_style="none", show_edge=False, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="left" if column in ("run", "state", "host") else "right", no_wrap=True)
    for run in runs:
        made.add_row(*(Text(COLUMNS[name](run), shade(run.state) if name == "state" else "") for name in columns))
    return made


def hosts(names: Sequence[str]) -> str:
    return "".join(names[:1]) + (f" + {len(names) - 1}" if len(names) > 1 else "")


def ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 90 else f"{duration(seconds)} ago"
