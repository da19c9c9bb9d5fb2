"""What a batch job that has ended died of, and whether it is to go on: the policy of `cluster.max_requeues`.

| cause | seen by |
|---|---|
| signal | the run stopped at a step's end, its checkpoint saved: preemption, or the time limit comes |
| lost | nothing: the attempt ended without a word, as when a node is lost |
| timeout | Slurm's word, where no checkpoint was saved in time |
| killed | a rank's exit code: SIGKILL, or a crash in native code |
| hung | stacks that the ranks' watchdogs have written |
| out_of_memory | a rank's exception, or the kernel's word in the job's log |
| not_finite, disk_full, misconfigured, failed | a rank's exception |
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sft.runs import failure

# As srun tells a process's end by a signal. One that could not yet remember SIGUSR1 or SIGTERM dies of it.
ENDS = {
    "User defined signal 1": "signal",
    "Terminated": "signal",
    "Alarm clock": "hung",
    "Killed": "killed",
    "Segmentation fault": "killed",
    "Aborted": "killed",
    "Bus error": "killed",
}
# These end an attempt through no fault of the run, so that two in one place say nothing.
OUTER = ("signal", "lost")


@dataclass(frozen=True)
class Death:
    """Why an attempt ended. `step` counts the optimizer steps that were done."""

    cause: str
    step: int
    error: str
    rank: int | None = None
    host: str | None = None
    details: str = ""  # a traceback or a stack

    def event(self) -> dict[str, Any]:
        """What the run's story says of it."""
        return {key: value for key, value in asdict(self).items() if key != "details" and value is not None}


def ended(log: str) -> str | None:
    """Why Slurm itself has ended a job, by its word in the log: "" where a user has cancelled it, None where it has
    not."""
    # "*** JOB 3 ON n1 CANCELLED AT 2026-11-20T18:58:19 DUE TO TIME LIMIT ***"; newer ones name the signal of a cancel.
    told = re.search(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL [^*]*)?(.*)\*\*\*", log)
    return told[1].strip() if told else None


def examine(folder: Path, restart: int, exit_code: int, step: int, log: str) -> Death:
    """Why an attempt died whose ranks ended with `exit_code` (of `srun`).

    Args:
        folder: of the job, with `attempt-M-rank-N.json`, `attempt-M-rank-N.stack` and `rank-N.err`.
        step: the last one known to be done.
        log: what Slurm and the first rank have printed in this attempt.
    """
    reports = failure.read(folder, restart)
    if reports and not reports[0]["following"]:
        return _reported(reports[0])
    stacks = [path for path in folder.glob(f"attempt-{restart}-rank-*.stack") if path.stat().st_size]
    if stacks and ("Alarm clock" in log or exit_code == 128 + signal.SIGALRM):  # not one that came to life again
        error = f"{len(stacks)} ranks gave no sign of life for too long: their stacks are {folder}/*.stack"
        return Death("hung", step, error, details=min(stacks).read_text(errors="replace")[-4000:])
    # What srun tells of the first rank that ended badly: "srun: error: n2: task 3: Killed".
    told = re.search(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)", log)
    host, rank, end = (told[1], int(told[2]), told[3]) if told else (None, None, _signal(exit_code - 128))
    if re.search("oom.kill event|Out Of Memory", log):
        return Death("out_of_memory", step, "the kernel killed a process for want of memory", rank, host)
    cause = next((cause for name, cause in ENDS.items() if end.startswith(name)), None)
    if cause is None and reports:
        return _reported(reports[0])
    if cause is None:
        cause, end = ("failed", f"exit code {exit_code}") if exit_code < 128 else ("killed", end)
    return Death(cause, step, f"a rank ended: {end}", rank, host, _tail(folder, rank, restart))


def _reported(report: dict[str, Any]) -> Death:
    return Death(*(report[key] for key in ("cause", "step", "error", "rank", "host", "traceback")))


def _signal(number: int) -> str:
    return (signal.strsignal(number) if 0 < number < signal.NSIG else None) or ""


def _tail(folder: Path, rank: int | None, restart: int) -> str:
    """The end of what a rank has written to stderr in this attempt, without torch's warnings."""
    path = folder / f"rank-{rank}.err"
    if not path.exists():
        return ""
    written = path.read_text(errors="replace").rpartition(f"restart {restart} ")[2]
    return "\n".join([line for line in written.splitlines()[1:] if not line.startswith("[W")][-40:])


def decide(death: Death, events: Sequence[Mapping[str, Any]], max_requeues: Mapping[str, int]) -> tuple[bool, str]:
    """Whether the job, whose `events` are given, is to be requeued, and why."""
    same = [each for each in events if each["event"] == "requeue" and each["cause"] == death.cause]
    if death.cause not in OUTER and any(each["step"] == death.step for each in same):
        return False, f"the same failure twice at step {death.step}: a retry can't help"
    allowed = max_requeues[death.cause]
    setting = f"cluster.max_requeues.{death.cause}={allowed}"
    if len(same) >= allowed:
        return False, f"requeued {len(same)} times for it ({setting})" if same else f"a retry can't help ({setting})"
    return True, f"{len(same) + 1} of {setting}"
