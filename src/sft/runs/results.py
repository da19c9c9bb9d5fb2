"""A run's figures, read from its folder."""

import math
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sft.runs import lease
from sft.runs.identity import deciding
from sft.runs.lease import duration
from sft.runs.metrics_file import Metrics
from sft.runs.process import live_process
from sft.runs.run import Run

HANG_AFTER = 900  # seconds, as conf/cluster/default.yaml
SLACK = 120  # seconds in which a rank that hangs is ended, and a file's time may be off


@dataclass(frozen=True)
class Result:
    """A run's state and figures; NaN where nothing was measured."""

    name: str
    settings: dict[str, object]  # those that decide the numbers, by dotted name
    state: str = "new"  # that of `status.json`; died, or silent with a time, where its process didn't end it
    step: int = 0  # the last in `metrics.csv`
    num_steps: int | None = None  # of the whole run; None before its start
    best: float = math.nan  # lowest validation loss after a step
    last: float = math.nan  # validation loss of the step that was exported, which is the last unless that is the best
    speed: float = math.nan  # tokens a second in the median step
    error: str | None = None  # why it failed
    folder: Path = Path()

    @classmethod
    def read(cls, run: Run) -> "Result":
        status, metrics = run.status, Metrics.read(run.folder / "metrics.csv")
        trained = Metrics(metrics.columns, [row for row in metrics.rows if row.get("train/tokens_per_second")])
        exported = Metrics([], [row for row in metrics.rows if row["step"] == str(status.get("exported"))])
        return cls(
            name=run.folder.name,
            settings=deciding(run.config),
            state=state(run),
            step=metrics.step,
            num_steps=status.get("num_steps"),
            best=trained.lowest("val/loss"),
            last=(exported if exported.values("val/loss") else metrics).last("val/loss"),
            speed=metrics.median("train/tokens_per_second"),
            error=status.get("error"),
            folder=run.folder,
        )


def state(run: Run) -> str:
    """The state of a run, by its heartbeat where it says that it is running: died, if its process is gone without a
    trace as after SIGKILL, suspended, or silent, if its machine is another one and doesn't write."""
    status = run.status
    said = status.get("state", "new")
    if said != "running" or "pid" not in status:
        return said
    held = lease.newest(run.folder)
    if held and held.state:
        return held.state
    if not held and status["host"] == socket.gethostname() and status["process"]:  # begun before there were leases
        return said if live_process(status["pid"]) == status["process"] else "died"
    files = [run.folder / name for name in ("status.json", "metrics.csv", "events.jsonl")]
    silent = time.time() - max(
        file.stat().st_mtime for file in (*files, *([held.path] if held else [])) if file.exists()
    )
    if silent <= SLACK:
        return said  # whatever its configuration says, which takes long to read
    longest = 0 if held else (run.config.get("cluster") or {}).get("hang_after") or HANG_AFTER
    return f"silent {duration(silent)}" if silent > longest + SLACK else said


def best_first(results: Iterable[Result]) -> list[Result]:
    """In order of the last validation loss; runs without one at the end."""
    return sorted(results, key=lambda result: (math.isnan(result.last), result.last))


def differing(results: list[Result]) -> dict[str, str]:
    """The settings in which some runs differ, each with the last part of its name, or all where two end alike. Those
    that tell most come first: with more values, numbers, the optimizer's."""

    def telling(name: str) -> tuple[int, bool, bool]:
        values = [result.settings.get(name) for result in results]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        return -len({repr(value) for value in values}), not numeric, not name.startswith("optimizer.")

    names = sorted({name for result in results for name in result.settings})
    varied = [name for name in names if len({repr(result.settings.get(name)) for result in results}) > 1]
    varied.sort(key=telling)
    last = {name: name.rpartition(".")[2] for name in varied}
    return {name: name if list(last.values()).count(part) > 1 else part for name, part in last.items()}


def summarise(run: Run, metrics: Metrics, chosen: str) -> None:
    """Prints the run's figures and its files, and which step it gives."""
    speed = metrics.median("train/tokens_per_second")
    print(f"finished {run.folder} {after(run)}")
    if not math.isnan(metrics.last("val/loss")):
        first, last = metrics.first("val/loss"), metrics.last("val/loss")
        hardly = ": it hardly moved, so try a higher optimizer.lr or more steps" if 0.99 < last / first <= 1 else ""
        print(f"  validation loss   {first:.4f} before, {last:.4f} after{hardly}")
    print(f"  speed             {speed:,.0f} tokens/s (median step)")
    print(f"  exported          {chosen}" if run.export.exists() else f"  to export         {chosen}")
    if run.export.exists():
        print(f"  model             {run.export}")
    print(f"  report            {run.folder / 'report.html'}")
    print(f"  metrics           {run.folder / 'metrics.csv'}")
    print(f"  what was trained  {run.folder / 'preview.html'}, {run.folder / 'data.json'}", flush=True)
    for offline in sorted((run.folder / "wandb").glob("offline-run-*")):
        print(f"  to W&B            wandb sync {offline}", flush=True)


def after(run: Run) -> str:
    """After how many steps a run has finished, and why if they are not all."""
    status = run.status
    if "stopped_early" not in status:
        return f"after {status['step']} steps"
    return f"after {status['step']} of {status['num_steps']} steps: {status['stopped_early']}"
