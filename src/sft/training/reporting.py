"""The run's report is written again after each validation, and at the end however that comes."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from sft.report import page
from sft.runs.run import Run
from sft.training.log import is_main, log

SHARE = 0.01  # of a run's time that reports may take


class Report(Callback):
    """Writes `report.html` on the first rank, less often where validations are so many that it would take long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.next = 0.0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        start = time.monotonic()
        if trainer.is_global_zero and start >= self.next:
            write(self.folder)
            now = time.monotonic()
            self.next = now + (now - start) / SHARE


def write(folder: Path, status: Mapping[str, Any] | None = None) -> None:
    """Writes it if the run is this process's; whatever prevents it is one line. `status`: what status.json will say."""
    try:
        if Run(folder).status.get("pid") == os.getpid():  # else there is none, or another process is training it
            page.write(folder, status=status)
    except Exception as error:  # a report is no reason to end a run
        log(f"{folder / page.NAME} can't be written: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


@contextmanager
def reported(folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A last report of what is done within, on the first rank. What is yielded writes that of a finished run, with
    what its status will say, before trackers take the run's files."""

    def finished(status: Mapping[str, Any]) -> None:
        if is_main():
            write(folder, {"state": "finished", **status})

    try:
        yield finished
    finally:
        if is_main():
            write(folder)
