"""Load of every node, under the same names in each tracker: W&B itself measures only the node of the first rank.

W&B's shared mode, in which several nodes write one run, takes no step numbers, needs a server, and is experimental. So
the first rank of each node writes what it measures into the run's folder, and the first rank of all gives it on.
"""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import psutil
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from sft.runs.files import write_json

EVERY = 15.0  # seconds
GPU = ("utilization.gpu", "memory.used", "power.draw")  # %, MiB, W


class Nodes(Logger):
    """Measures this node if the rank is its first, and gives the measures of all nodes to the trackers."""

    name = "nodes"
    version = 0

    def __init__(self, folder: Path, trackers: list[Logger]) -> None:
        super().__init__()
        self.folder, self.trackers, self.ended, self.given = folder / "logs" / "nodes", trackers, Event(), 0.0
        rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        if rank == "0":
            Thread(target=self._measure, daemon=True).start()

    def _measure(self) -> None:
        while not self.ended.is_set():
            with suppress(Exception):  # a full disk, a driver that fails
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / f"{socket.gethostname()}.json", {"time": time.time(), **load()})
            self.ended.wait(EVERY)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if time.monotonic() - self.given < EVERY:
            return
        self.given = time.monotonic()
        values = latest(self.folder)
        for tracker in self.trackers if values else ():
            tracker.log_metrics(values, step=step)

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """There are none."""

    def finalize(self, status: str) -> None:
        self.ended.set()


def load() -> dict[str, float]:
    """Of this node: shares of the processors and the memory in use, and of each GPU its use, memory and power."""
    measured = {"cpu": psutil.cpu_percent(), "memory": psutil.virtual_memory().percent}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", f"--query-gpu={','.join(GPU)}", "--format=csv,noheader,nounits"]
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=EVERY, check=True).stdout
        for number, row in enumerate(answer.splitlines()):
            use, memory, power = row.split(", ")
            for name, text in ((f"gpu{number}", use), (f"gpu{number}_mib", memory), (f"gpu{number}_watt", power)):
                with suppress(ValueError):  # [N/A]
                    measured[name] = float(text)
    return measured


def latest(folder: Path) -> dict[str, float]:
    """The newest measures of all nodes, as system/NODE/NAME; without those of nodes that have stopped measuring."""
    values: dict[str, float] = {}
    for file in sorted(folder.glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # it is damaged, or gone
            measured = json.loads(file.read_text())
            if time.time() - measured.pop("time") < 4 * EVERY:
                values |= {f"system/{file.stem}/{name}": value for name, value in measured.items()}
    return values
