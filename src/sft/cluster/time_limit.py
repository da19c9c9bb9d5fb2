"""A job's time limit against what has to fit in it: the ranks' start, the signal, checkpoints."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sft.errors import UserError

LEAST_WORK = 60  # seconds between a job's start and its signal


def duration(text: str) -> float:
    """Seconds of a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, and after `days-` from
    hours on; infinite for 0 and words."""
    if text.lower() in ("infinite", "unlimited", "0"):
        return math.inf
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        raise UserError(f"--time={text} is no time: set it like 30 (minutes), 4:00:00 or 1-12:00:00")
    days, first, second, third = (int(each) if each else None for each in found.groups())
    if days is not None or third is not None:
        hours, minutes, seconds = first, second, third
    else:
        hours, minutes, seconds = 0, first, second
    return (((days or 0) * 24 + (hours or 0)) * 60 + (minutes or 0)) * 60.0 + (seconds or 0)


def clock(seconds: float) -> str:
    """hours:minutes:seconds"""
    if seconds == math.inf:
        return "UNLIMITED"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def check_limit(limit: float, lead: int) -> None:
    """Refuses a job that gets its signal as soon as it has started. Both in seconds."""
    if limit < lead + LEAST_WORK:
        raise UserError(
            f"a job of {clock(limit)} gets its signal {lead} s before the end, almost at once: set --time to "
            f"{clock(lead + LEAST_WORK)} or more, or a later signal with --signal=USR1@SECONDS"
        )


def check_interval(
    limit: float, lead: int, num_ranks: int, story: Sequence[Mapping[str, Any]], save_every: int | None
) -> list[str]:
    """Compares with the times of the run's earlier attempts on as many ranks: refuses a job that ends before its first
    regular checkpoint; a note where the signal comes too late for a step and a save. `save_every` in steps, None: as
    then."""
    intervals, saving = _measured(story, num_ranks)
    if not intervals:
        return []
    step = statistics.median(seconds / steps for steps, seconds in intervals)
    steps = save_every or max(steps for steps, _ in intervals)
    if limit - lead < steps * step:
        raise UserError(
            f"the {steps} steps between two checkpoints took {clock(steps * step)} in earlier attempts, and "
            f"this job has {clock(limit - lead)} until its signal: set checkpoint.save_every="
            f"{max(1, int((limit - lead) / step))} or less, or a longer --time"
        )
    if step + saving <= lead:
        return []
    return [
        f"a step and a save took {step + saving:.0f} s in earlier attempts, and --signal leaves {lead} s: "
        f"--signal=USR1@{2 * math.ceil(step + saving)} is safer"
    ]


def _measured(story: Sequence[Mapping[str, Any]], num_ranks: int) -> tuple[list[tuple[int, float]], float]:
    """Steps and seconds between saves, and the seconds of the longest save."""
    before, intervals, saving = None, [], 0.0
    for event in story:
        if event["event"] == "start":
            before = event if event["num_ranks"] == num_ranks else None
        elif event["event"] == "save" and before:
            seconds = (datetime.fromisoformat(event["time"]) - datetime.fromisoformat(before["time"])).total_seconds()
            if (steps := event["step"] - before["step"]) > 0:
                intervals.append((steps, seconds))
            before, saving = event, max(saving, event["seconds"])
    return intervals, saving
