"""Whether a job's time limit leaves room for the ranks' start, a step and a checkpoint."""

import math
import re
from collections.abc import Sequence

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


def note_on_saves(events: Sequence[Event], signal_seconds_before_end: int) -> list[str]:
    """A note if the signal comes too late for a step and a save, by the longest save of the run's earlier attempts."""
    longest = max((event["seconds"] for event in events if event["event"] == "save"), default=0.0)
    if 2 * longest <= signal_seconds_before_end:
        return []
    return [
        f"a save took {longest:.0f} s in earlier attempts, and --signal leaves {signal_seconds_before_end} s for the "
        f"step under way and a save: --signal=USR1@{math.ceil(4 * longest)} is safer"
    ]
