"""Whether queued jobs have ended, asked of the controller."""

import os
import time

from submitit.slurm.slurm import SlurmInfoWatcher

ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "GONE",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "REVOKED",
    "TIMEOUT",
}


class Watcher(SlurmInfoWatcher):
    """By squeue, while submitit's own needs the accounting database, which not every cluster has."""

    def __init__(self) -> None:
        super().__init__(delay_s=20)  # a job is shown for minutes after its end (MinJobAge)
        self._missed: dict[str, float] = {}

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        user = str(os.getuid())
        return ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.split("|", 1) for line in text.splitlines())
        found = {job: states.get(job) or self._gone(job) for job in self._registered - self._finished}
        self._missed = {job: since for job, since in self._missed.items() if job not in states}
        # There are many states of a job that goes on; submitit knows a few.
        return {job: {"JobID": job, "State": state if state in ENDED else "RUNNING"} for job, state in found.items()}

    def _gone(self, job: str) -> str:
        """A job that isn't shown is gone if it isn't shown a little later either."""
        since = self._missed.setdefault(job, time.monotonic())
        return "GONE" if time.monotonic() - since > 15 else "MISSED"
