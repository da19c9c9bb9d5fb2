"""Why a rank failed: its cause, and a report for the code that decides whether the job is requeued."""

import json
import os
import re
import socket
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TypedDict, cast

from sft.errors import NotFinite, UserError, chain, disk_is_full
from sft.runs import watchdog
from sft.runs.files import write_json
from sft.runs.secrets import redacted

# Errors of a rank that lost another one: they follow from that one's failure.
FOLLOWING = re.compile(
    r"^rank \d+: |connection (was )?(closed|reset|refused)|broken pipe|processgroup|nccl|gloo|socket timeout|tcpstore"
    r"|wait timeout",
    re.IGNORECASE,
)


class Report(TypedDict):
    """A rank's failure."""

    rank: int
    host: str
    time: float  # seconds since the epoch
    step: int  # optimizer steps done
    cause: str
    following: bool  # it only follows from another rank's failure
    error: str
    traceback: str  # none of a user's mistake, which its line explains


def cause(error: BaseException) -> str:
    """`not_finite`, `misconfigured`, `disk_full`, `out_of_memory` or `failed`."""
    links = chain(error)
    names = {type(link).__name__ for link in links}
    if any(isinstance(link, NotFinite) for link in links):
        return "not_finite"
    if any(disk_is_full(link) for link in links):
        return "disk_full"
    if names & {"MemoryError", "OutOfMemoryError"} or any("out of memory" in str(link).lower() for link in links):
        return "out_of_memory"
    if any(isinstance(link, UserError | PermissionError) or _of_configuration(link) for link in links):
        return "misconfigured"
    return "failed"


def _of_configuration(error: BaseException) -> bool:
    # Hydra wraps any error that a setting's target raises in one of its own: then the wrapped error counts.
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf") and error.__cause__ is None


def write(folder: Path, error: BaseException) -> None:
    """Writes this rank's failure to the job's folder, as `attempt-M-rank-N.json`; OSError where that fails."""
    rank = int(os.environ.get("SLURM_PROCID", 0))
    report: Report = {
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "step": watchdog.step,
        "cause": cause(error),
        "following": follows(error),
        "error": redacted(f"{type(error).__name__}: {error}"[:2000]),
        "traceback": ""
        if isinstance(error, UserError)
        else redacted("".join(traceback.format_exception(error))[-20_000:]),
    }
    restart = os.environ.get("SLURM_RESTART_COUNT", 0)
    write_json(folder / f"attempt-{restart}-rank-{rank}.json", report)


def read(folder: Path, restart: int) -> list[Report]:
    """The failures of one attempt of a job, in order of time, those that only follow from another rank's last."""
    reports: list[Report] = []
    for path in folder.glob(f"attempt-{restart}-rank-*.json"):
        with suppress(ValueError):  # it is damaged, and other ranks have told, too
            report = json.loads(path.read_text())
            if isinstance(report, dict) and report.keys() >= Report.__required_keys__:
                reports.append(cast(Report, report))
    return sorted(reports, key=lambda report: (report["following"], report["time"]))


def follows(error: BaseException) -> bool:
    """Whether the error only follows from another rank's failure."""
    return any(FOLLOWING.search(str(link)) for link in chain(error))
