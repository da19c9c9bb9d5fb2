"""A run's story: one JSON line an event in `events.jsonl`. Starts, signals, the end of `max_time`, saves, failures with
their causes, and decisions. The first rank and the batch script's own steps append to it; nothing is ever rewritten."""

import json
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Required, TypedDict, cast

from sft.runs.provenance import now
from sft.runs.secrets import redacted


class SlurmJob(TypedDict, total=False):
    """A Slurm job and how often it has been requeued; empty outside a job."""

    job: int
    restart: int


class Computation(TypedDict):
    """What decides a run's numbers beyond its configuration."""

    files: dict[str, dict[str, str]]  # part → file → its hash
    versions: dict[str, str]


class Event(SlurmJob, total=False):
    """Every event has its `time` (UTC) and its kind, `event`; the others have the fields of that kind."""

    time: Required[str]
    event: Required[str]
    step: int  # optimizer steps done
    hosts: list[str]
    num_ranks: int
    commit: str | None  # of a start, of this code
    computation: str  # of a start: the hash of what decides its numbers (sft.runs.computation), and
    code: Computation  # that itself, where it is not an earlier start's
    untracked: dict[str, str]  # of `code`: files that no commit has → their hashes
    changed: str  # since the start before, in a line
    allowed: list[str]  # by resume.allow, where the change needed it
    seconds: float  # of a save
    signal: str
    cause: str
    error: str
    rank: int
    host: str
    why: str
    options: list[str]  # of sbatch
    settings: list[str]  # of sft train
    job_nodelist: str | None
    ntasks: str | None
    title: str  # of an alert
    text: str
    max_requeues: dict[str, int]


def job() -> SlurmJob:
    """The Slurm job of this process."""
    number = os.environ.get("SLURM_JOB_ID")
    return {"job": int(number), "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))} if number else {}


def record(folder: Path, event: str, **details: object) -> None:
    """Appends an event to the run's story in a single write."""
    said = {"time": now(), "event": event, **job(), **{name: _told(detail) for name, detail in details.items()}}
    line = json.dumps(said) + "\n"
    descriptor = os.open(folder / "events.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # the disk was full
        os.write(descriptor, ("\n" * bool(torn) + line).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _told(detail: object) -> object:
    """Without what is secret; settings are words such as `logger.api_key=...`."""
    if isinstance(detail, list):
        return [_told(one) for one in detail]
    return redacted(detail) if isinstance(detail, str) else detail


def read(folder: Path) -> list[Event]:
    """All events so far, oldest first; a line that is cut short or damaged is left out."""
    try:
        lines = (folder / "events.jsonl").read_text(errors="replace").split("\n")
    except FileNotFoundError:
        return []
    events: list[Event] = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            event = json.loads(line)
            if isinstance(event, dict) and all(isinstance(event.get(name), str) for name in ("time", "event")):
                datetime.fromisoformat(event["time"])
                events.append(cast(Event, event))
    return events
