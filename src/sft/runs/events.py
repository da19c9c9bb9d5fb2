"""The story of a run, a line of JSON an event in `events.jsonl`: starts and where, signals, saves, failures and their
causes, and what was decided. Only appended to, by the first rank and by the batch script's own steps."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft.runs.provenance import now

Event = dict[str, Any]  # "time" and "event", which names its kind; the other keys depend on that


def job() -> dict[str, int]:
    """The Slurm job that this process is in, and how often it has been requeued; empty outside one."""
    number = os.environ.get("SLURM_JOB_ID")
    return {"job": int(number), "restart": int(os.environ.get("SLURM_RESTART_COUNT", 0))} if number else {}


def record(folder: Path, event: str, **details: object) -> None:
    """Appends one event to the run's story, in a single write."""
    line = json.dumps({"time": now(), "event": event, **job(), **details}) + "\n"
    descriptor = os.open(folder / "events.jsonl", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"  # the disk was full
        os.write(descriptor, ("\n" * bool(torn) + line).encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> list[Event]:
    """All events so far, oldest first; a line cut short is left out."""
    try:
        lines = (folder / "events.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    events = []
    for line in lines:
        with suppress(ValueError):
            events.append(json.loads(line))
    return events
