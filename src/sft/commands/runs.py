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
from collections.abc import Iterable
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sft.cluster.slurm import queue_if_known
from sft.errors import UserError
from sft.report.overview import COLUMNS, table
from sft.report.progress import Progress, find
from sft.runs.plain import plain

if TYPE_CHECKING:
    from rich.console import Console

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
    """Prints the table, and why runs failed."""
    from rich.console import Console
    from rich.text import Text

    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:  # a log has no width
            console.width = 240
    runs = sorted(runs, key=lambda run: math.inf if math.isnan(run.changed) else run.changed, reverse=True)
    shown = [name for name in COLUMNS if name != "training loss"]
    console.print(table(runs, shown, console.width), soft_wrap=True)
    for run in runs:
        if run.error:
            text = f"{run.folder.name} {run.state}: {' '.join(run.error.split())[:300]}"
            console.print(Text(plain(text)), soft_wrap=True)
