"""What a rank died of: told apart, and left behind for who decides what comes next."""

import errno
import json
import os
import re
import socket
import time
import traceback
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.runs import watchdog
from sft.runs.files import write_json

# What the ranks that outlive another one say: it follows from that one's failure.
FOLLOWING = re.compile(
    r"^rank \d+: |connection (was )?(closed|reset|refused)|broken pipe|processgroup|nccl|gloo|socket timeout|tcpstore"
    r"|wait timeout",
    re.IGNORECASE,
)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class NotFinite(UserError):
    """The loss or the gradient of a step is infinite or not a number."""


def chain(error: BaseException) -> list[BaseException]:
    """An exception and those that it came from, newest first."""
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = link.__cause__ or link.__context__
    return links


def disk_is_full(error: BaseException) -> bool:
    # safetensors reports what the system said as text only.
    return (isinstance(error, OSError) and error.errno in FULL_DISK) or "No space left on device" in str(error)


def cause(error: BaseException) -> str:
    """`not_finite`, `misconfigured`, `disk_full`, `out_of_memory` or `failed`."""
    links = chain(error)
    names = {type(link).__name__ for link in links}
    if "NotFinite" in names:
        return "not_finite"
    if any(disk_is_full(link) for link in links):
        return "disk_full"
    if names & {"MemoryError", "OutOfMemoryError"} or any("out of memory" in str(link).lower() for link in links):
        return "out_of_memory"
    if any(isinstance(link, UserError | PermissionError) or _of_configuration(link) for link in links):
        return "misconfigured"
    return "failed"


def _of_configuration(error: BaseException) -> bool:
    # Hydra puts an error of its own around any that a setting's target raises: that one counts.
    return type(error).__module__.partition(".")[0] in ("hydra", "omegaconf") and error.__cause__ is None


def write(folder: Path, error: BaseException) -> None:
    """Leaves this rank's failure in the job's folder, as `attempt-M-rank-N.json`; OSError where that can't be."""
    rank = int(os.environ.get("SLURM_PROCID", 0))
    report: dict[str, Any] = {
        "rank": rank,
        "host": socket.gethostname(),
        "time": time.time(),
        "step": watchdog.step,
        "cause": cause(error),
        "following": any(FOLLOWING.search(str(link)) for link in chain(error)),
        "error": f"{type(error).__name__}: {error}"[:2000],
        "traceback": "".join(traceback.format_exception(error))[-20_000:],
    }
    restart = os.environ.get("SLURM_RESTART_COUNT", 0)
    write_json(folder / f"attempt-{restart}-rank-{rank}.json", report)


def read(folder: Path, restart: int) -> list[dict[str, Any]]:
    """The failures of one attempt of a job: what came first, and what only followed from another rank's end, last."""
    reports = [json.loads(path.read_text()) for path in folder.glob(f"attempt-{restart}-rank-*.json")]
    return sorted(reports, key=lambda report: (report["following"], report["time"]))
