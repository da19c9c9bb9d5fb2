"""sft watch: follows a run in the terminal, from its files alone: progress, curves, an answer, events.

  sft watch
      the newest run that is running, or else the newest
  sft watch gsm8k-1a2b3c4d
      this one, on any machine that sees its folder, such as a login node; one that is queued, from then on
  sft watch 'gsm8k-*'
      several, a line each
  sft watch once=true
      prints what there is now, and ends

It ends with the run: exit code 0 if that has finished, 1 if it has failed or died, 75 if it was interrupted and no job
continues it. Ctrl-C ends it alone, never the run. Where the output is no terminal, it prints what there is, then a line
for each validation and event.
"""

import math
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sft.cluster.slurm import QueuedJob, queue_if_known
from sft.errors import UserError
from sft.report.overview import table
from sft.report.progress import Progress, find
from sft.report.screen import CURVES, SEEN, news, view
from sft.runs import answers_file
from sft.runs.answers_file import Answer
from sft.runs.metrics_file import Following

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

PATIENCE = 3.0  # seconds for Slurm to answer
SEVERAL = ("run", "state", "step", "training loss", "validation loss", "left")
WIDTH = 100  # of what is printed where there is no terminal
ASK_EVERY = 10.0  # seconds between two questions to Slurm, whose controller has others to serve


def main(config: DictConfig) -> None:
    from rich.console import Console

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the terminal is left as it was
    console = Console(highlight=False)
    names = [config.run] if isinstance(config.run, str) else list(config.run or ())
    queue = Queue()
    folders = find(names, config.runs_dir, queue.jobs())
    if not folders:
        raise UserError(f"there are no runs in {config.runs_dir}: set runs_dir=")
    watched = [Watched(folder, queue) for folder in folders]
    if not names:
        watched = [max(watched, key=lambda one: (one.run.state == "running", one.run.began))]
    show = follow if console.is_terminal and not console.is_dumb_terminal else report
    sys.exit(show(watched, console, math.inf if config.once else config.every))


class Queue:
    """Slurm's, asked now and then."""

    def __init__(self) -> None:
        self.asked = -math.inf
        self.known: list[QueuedJob] | None = None

    def jobs(self) -> list[QueuedJob] | None:
        if time.monotonic() - self.asked > ASK_EVERY:
            self.known = queue_if_known(PATIENCE)
            self.asked = time.monotonic()
        return self.known


class Watched:
    """A run's files, read as far as they are new."""

    def __init__(self, folder: Path, queue: Queue) -> None:
        self.folder, self.queue = folder, queue
        self.metrics = Following(folder / "metrics.csv", (*CURVES, *SEEN))
        self.answer: Answer | None = None
        self.answers_changed = 0.0
        self.run = Progress.read(folder, queue.jobs())

    def read(self) -> None:
        """Looks again. Slurm isn't asked about a run whose files say that it is running."""
        with suppress(OSError, ValueError, LookupError, TypeError):  # broken files
            self.metrics.read()
            changed = (self.folder / "samples.jsonl").stat().st_mtime
            if changed != self.answers_changed:
                self.answer, self.answers_changed = first_of_last(self.folder), changed
        self.run = Progress.read(self.folder, self.queue.known)
        if self.run.state != "running":
            self.run = Progress.read(self.folder, self.queue.jobs())

    def view(self, width: int, height: int) -> "RenderableType":
        return view(self.run, self.metrics.curves, self.answer, width, height, time.time())


def first_of_last(folder: Path) -> Answer | None:
    """The first prompt's answer of the last step, so that it is the same prompt each time."""
    answers = answers_file.read(folder)
    last = [answer for answer in answers if answer["step"] == answers[-1]["step"]]
    return min(last, key=lambda answer: answer["number"], default=None)


def follow(watched: Sequence[Watched], console: "Console", every: float) -> int:
    """On the whole screen until the runs have ended; what was last there stays."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def shown() -> "RenderableType":  # of several those first that go on
        if len(watched) == 1:
            return watched[0].view(console.width, console.height - 2)
        runs = sorted((one.run for one in watched), key=lambda run: run.exit_code is not None)
        return table(runs[: max(1, console.height - 5)], SEVERAL, console.width, with_bar=True)

    def live() -> "RenderableType":
        return Group(shown(), Text("\nCtrl-C ends the watch, not the run", "dim"))

    read(watched)
    if math.isfinite(every) and code(watched) is None:
        try:
            with Live(live(), console=console, screen=True, auto_refresh=False) as screen:
                while code(watched) is None:
                    time.sleep(every)
                    read(watched)
                    screen.update(live(), refresh=True)
        finally:
            console.print(shown())
    else:
        console.print(shown())
    return code(watched) or 0


def report(watched: Sequence[Watched], console: "Console", every: float) -> int:
    """In lines, for a file or a pipe: what there is, then what is new."""
    read(watched)
    for one in watched:
        console.print(one.view(WIDTH, 100), soft_wrap=True)
    while math.isfinite(every) and code(watched) is None:
        before = [(one.run, one.metrics.curves["val/loss"].steps[-1:]) for one in watched]
        time.sleep(every)
        read(watched)
        for one, (run, validated) in zip(watched, before, strict=True):
            is_validated = one.metrics.curves["val/loss"].steps[-1:] not in (validated, [])
            for line in news(run, one.run, is_validated, time.time()):
                print(line, flush=True)
    return code(watched) or 0


def read(watched: Sequence[Watched]) -> None:
    for one in watched:
        one.read()


def code(watched: Sequence[Watched]) -> int | None:
    """The exit code when all have ended: the worst of theirs, failed before interrupted."""
    codes = [one.run.exit_code for one in watched]
    return None if None in codes else next((code for code in (1, 75) if code in codes), 0)
