"""Whether a job's time limit leaves room for the ranks' start, a step and a checkpoint."""

import math
import re
import statistics
from collections.abc import Sequence
from datetime import datetime

from sft.errors import UserError
from sft.runs.events import Event

LEAST_WORK = 60  # seconds between a job's start and its signal


def duration(text: str) -> float:
    """Seconds of a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds; after `days-` it begins
    with hours. Infinite for 0, infinite and unlimited."""
    if text.lower() in ("infinite", "unlimited", "0"):
        return math.inf
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise UserError(f"--time={text} is no time: set it like 30 (minutes), 4:00:00 or 1-12:00:00")
    days, first, second, third = (int(number or 0) for number in match.groups())
    if match[1] or match[4]:
        return ((days * 24 + first) * 60 + second) * 60.0 + third
    return first * 60.0 + second


def clock(seconds: float) -> str:
    """hours:minutes:seconds"""
    if seconds == math.inf:
        return "UNLIMITED"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def check_limit(limit: float, signal_seconds_before_end: int) -> None:
    """Refuses a job that gets its signal as soon as it has started. Both in seconds."""
    least = signal_seconds_before_end + LEAST_WORK
    if limit < least:
        raise UserError(
            f"a job of {clock(limit)} gets its signal {signal_seconds_before_end} s before the end, almost at once: "
            f"set --time to {clock(least)} or more, or a later signal with --signal=USR1@SECONDS"
        )


def check_interval(
    limit: float, signal_seconds_before_end: int, num_ranks: int, events: Sequence[Event], save_every: int | None
) -> list[str]:
    """Refuses a job too short for its first regular checkpoint, judged by the run's earlier attempts on as many ranks;
    returns a note if the signal comes too late for a step and a save. `save_every` in steps;
    None: as in those attempts."""
    intervals, longest_save = _measured(events, num_ranks)
    if not intervals:
        return []
    step = statistics.median(seconds / num_steps for num_steps, seconds in intervals)
    save_every = save_every or max(num_steps for num_steps, _ in intervals)
    until_signal = limit - signal_seconds_before_end
    if until_signal < save_every * step:
        raise UserError(
            f"the {save_every} steps between two checkpoints took {clock(save_every * step)} in earlier attempts, and "
            f"this job has {clock(until_signal)} until its signal: set checkpoint.save_every="
            f"{max(1, int(until_signal / step))} or less, or a longer --time"
        )
    needed = step + longest_save
    if needed <= signal_seconds_before_end:
        return []
    return [
        f"a step and a save took {needed:.0f} s in earlier attempts, and --signal leaves {signal_seconds_before_end} "
        f"s: --signal=USR1@{2 * math.ceil(needed)} is safer"
    ]


def _measured(events: Sequence[Event], num_ranks: int) -> tuple[list[tuple[int, float]], float]:
    """Steps and seconds of each interval between saves, and the seconds of the longest save."""
    before: Event | None = None
    intervals, longest_save = [], 0.0
    for event in events:
        if event["event"] == "start":
            before = event if event["num_ranks"] == num_ranks else None
        elif event["event"] == "save" and before:
            seconds = (datetime.fromisoformat(event["time"]) - datetime.fromisoformat(before["time"])).total_seconds()
            num_steps = event["step"] - before["step"]
            if num_steps > 0:
                intervals.append((num_steps, seconds))
            longest_save = max(longest_save, event["seconds"])
            before = event
    return intervals, longest_save
