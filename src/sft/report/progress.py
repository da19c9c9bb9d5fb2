"""What state a run is in, how far it is, and when it will end: from the ends of its files and what Slurm says."""

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatch
from itertools import pairwise
from pathlib import Path

import yaml

from sft.cluster.slurm import COMMENT, QueuedJob, of_run
from sft.runs import events
from sft.runs.events import Event
from sft.runs.metrics_file import Metrics, end
from sft.runs.results import state
from sft.runs.run import Run

FILES = ("status.json", "metrics.csv", "events.jsonl", "config.yaml")
EVENT = {"time", "event"}
VERDICT = 60.0  # seconds in which a batch script says whether a job is requeued
ENDED = ("finished", "interrupted", "failed")  # as the run itself has said
EXIT_CODES = {"finished": 0, "interrupted": 75, "failed": 1, "died": 1}


@dataclass(frozen=True)
class Progress:
    """Of one run. Times are in seconds; NaN where nothing is known."""

    folder: Path
    state: str  # as in sft compare; or queued, starting, unreadable
    error: str | None = None  # why it failed, or what is unreadable
    step: int = 0
    num_steps: int | None = None
    loss: float = math.nan  # the last
    val_loss: float = math.nan  # the last
    hosts: tuple[str, ...] = ()
    job: int | None = None  # the last one that has trained it, or the one that will
    waits: str | None = None  # why that job is not running yet
    began: float = math.nan  # its last attempt, since the epoch
    changed: float = math.nan  # when one of its files last did, since the epoch
    taken: float = math.nan  # by training so far, in all attempts
    left: float = math.nan
    story: tuple[Event, ...] = ()
    exit_code: int | None = None  # of a run that has ended: 0 finished, 1 failed or died, 75 interrupted

    @classmethod
    def read(cls, folder: Path, jobs: Sequence[QueuedJob] | None = None, now: float | None = None) -> "Progress":
        """Of a run's folder, whatever is missing or broken there. `jobs`: Slurm's queue; None where nobody knows it."""
        try:
            return cls._read(folder, jobs, time.time() if now is None else now)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return cls(folder, "unreadable", why, changed=_changed(folder))

    @classmethod
    def _read(cls, folder: Path, jobs: Sequence[QueuedJob] | None, now: float) -> "Progress":
        story = events.read(folder)
        run = Run(folder)
        status, metrics, found = run.status, end(folder / "metrics.csv", "val/loss"), state(run)
        changed = _changed(folder)
        start = next((event for event in reversed(story) if event["event"] == "start"), None)
        of_this = of_run(folder, story, jobs or ())
        job = next((job for job in of_this if job.state != "PENDING"), of_this[0] if of_this else None)
        known = _with_job(found, job, story)
        running, num_steps = found == "running", status.get("num_steps")
        marked = _seconds(status["time"]) if "time" in status else changed
        return cls(
            folder,
            state=known,
            error=status.get("error") if known in ("failed", "unreadable") else None,
            step=metrics.step,
            num_steps=num_steps,
            loss=metrics.last("train/loss"),
            val_loss=metrics.last("val/loss"),
            hosts=tuple((start or {"hosts": []}).get("hosts") or ([status["host"]] if "host" in status else [])),
            job=job.number if job else next((event["job"] for event in reversed(story) if "job" in event), None),
            waits=job.reason if job and job.state == "PENDING" else None,
            began=marked,
            changed=changed,
            taken=taken(story, now if running else marked if found in ENDED else changed),
            left=left(start, metrics, num_steps, changed, now) if running and num_steps else math.nan,
            story=tuple(story),
            exit_code=_exit_code(found, job, story, jobs is not None, now - changed),
        )


def taken(story: Sequence[Event], until: float) -> float:
    """Seconds of all attempts, each from its start to its last event, the last one to `until`."""
    starts = [at for at, event in enumerate(story) if event["event"] == "start"]
    if not starts:
        return math.nan
    # What comes between two attempts is about the later one's job.
    ends = [
        max(at for at in range(first, second) if story[at]["event"] not in ("submit", "job"))
        for first, second in pairwise(starts)
    ]
    times = [*(_seconds(story[at]["time"]) for at in ends), until]
    return sum(max(0.0, time - _seconds(story[at]["time"])) for at, time in zip(starts, times, strict=True))


def left(start: Event | None, metrics: Metrics, num_steps: int, changed: float, now: float) -> float:
    """Seconds to the last step: by the attempt's own time a step, validations and saves included, from its `start` to
    when its files last changed; without that, by the steps' own seconds alone."""
    remaining = num_steps - metrics.step
    done = metrics.step - start.get("step", 0) if start else 0
    each = (changed - _seconds(start["time"])) / done if start and done > 0 else metrics.median("train/seconds")
    return max(0.0, each * remaining - (now - changed))


def _with_job(found: str, job: QueuedJob | None, story: Sequence[Event]) -> str:
    """The state that files say, with what the queue knows better."""
    last = story[-1] if story else None
    if job is None or (found == "finished" and job.state != "PENDING"):
        return found
    if job.state == "PENDING":
        # Where a node was lost, the files still say that the run goes on.
        return "queued" if found != "running" or (last and last.get("job") == job.number) else found
    if last and last["event"] == "requeue":
        return "queued"
    if job.state == "SUSPENDED":
        return "suspended"
    return "starting" if found == "new" or (last and last["event"] == "job") else found


def _exit_code(found: str, job: QueuedJob | None, story: Sequence[Event], knows_queue: bool, age: float) -> int | None:
    """None while the run goes on, or a job will continue it."""
    if found not in EXIT_CODES or (job and (found != "finished" or job.state == "PENDING")):
        return None
    last = story[-1]["event"] if story and "job" in story[-1] else "stop"
    undecided = last == "requeue" or (last not in ("stop", "finish") and age < VERDICT)
    return None if found != "finished" and not knows_queue and undecided else EXIT_CODES[found]


def _changed(folder: Path) -> float:
    """When one of its files last was, since the epoch; NaN without any."""
    times = []
    for name in FILES:
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return max(times, default=math.nan)


def _seconds(moment: str) -> float:
    """Since the epoch."""
    return datetime.fromisoformat(moment).timestamp()


def find(names: Sequence[str], runs_dir: str, jobs: Sequence[QueuedJob] | None = None) -> list[Path]:
    """The folders of runs: of these names, patterns of names or folders; without any, all of `runs_dir`, with those
    that a sweep has queued and that have no folder yet. UserError for a name that no run has."""
    here = Path(runs_dir)
    folders = [path for path in sorted(here.iterdir()) if is_run(path)] if here.is_dir() else []
    comments = [Path(job.comment.removeprefix(COMMENT)) for job in jobs or () if job.comment.startswith(COMMENT)]
    there = {folder.name for folder in folders}
    folders += [here / path.name for path in comments if path.parent == here.resolve() and path.name not in there]
    found = []
    for name in names:
        folder = Path(name).expanduser()
        matches = [folder] if is_run(folder) else [path for path in folders if fnmatch(path.name, name)]
        found += matches or [Run.find(name, runs_dir).folder]
    return list(dict.fromkeys(found)) if names else folders


def is_run(folder: Path) -> bool:
    """Whether the folder is one of a run, begun or submitted."""
    return not folder.name.startswith(".") and any((folder / name).exists() for name in FILES)
