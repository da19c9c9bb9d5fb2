"""Reports to submitit whether queued jobs have ended, as the controller knows."""

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
    """Asks squeue; submitit's own watcher needs the accounting database, which not every cluster has."""

    def __init__(self) -> None:
        super().__init__(delay_s=20)  # squeue shows a job for minutes after its end (MinJobAge)
        self._missing_since: dict[str, float] = {}

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        user = str(os.getuid())
        return ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.split("|", 1) for line in text.splitlines())
        self._missing_since = {job: since for job, since in self._missing_since.items() if job not in states}
        infos = {}
        for job in self._registered - self._finished:
            state = states.get(job) or self._state_of_missing(job)
            # Slurm has many states for a job that hasn't ended; submitit knows a few.
            infos[job] = {"JobID": job, "State": state if state in ENDED else "RUNNING"}
        return infos

    def _state_of_missing(self, job: str) -> str:
        """A job that isn't shown is gone if it still isn't a little later."""
        since = self._missing_since.setdefault(job, time.monotonic())
        return "GONE" if time.monotonic() - since > 15 else "MISSED"
