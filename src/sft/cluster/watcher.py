"""Whether queued jobs have ended, asked of the controller."""

import os

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

    def _make_command(self) -> list[str] | None:
        if not self._registered - self._finished:
            return None
        user = str(os.getuid())
        return ["squeue", "--noheader", "--array", "--states=all", f"--user={user}", "--format=%i|%T"]

    def read_info(self, string: bytes | str) -> dict[str, dict[str, str]]:
        text = string if isinstance(string, str) else string.decode()
        states = dict(line.split("|", 1) for line in text.splitlines())
        found = {job: states.get(job, "GONE") for job in self._registered - self._finished}
        # There are many states of a job that goes on; submitit knows a few.
        return {job: {"JobID": job, "State": state if state in ENDED else "RUNNING"} for job, state in found.items()}
