"""Why a batch job's attempt ended, and whether to requeue the job: the policy of `cluster.max_requeues`.

| cause | evidence |
|---|---|
| signal | the run stopped at the end of a step and saved: preemption, or the time limit is near |
| lost | none: the attempt ended without a message, as when a node is lost |
| timeout | Slurm's message, and no checkpoint saved in time |
| killed | a rank's exit code: SIGKILL, or a crash in native code |
| hung | stacks written by the ranks' watchdogs |
| out_of_memory | a rank's exception, or the kernel's message in the job's log |
| not_finite, disk_full, misconfigured, failed | a rank's exception |
"""

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sft.runs import failure
from sft.runs.events import Event

# By srun's words for the end of a process. SIGUSR1 and SIGTERM kill only a process that has no handler yet.
CAUSE_OF_SIGNAL = {
    "User defined signal 1": "signal",
    "Terminated": "signal",
    "Alarm clock": "hung",
    "Killed": "killed",
    "Segmentation fault": "killed",
    "Aborted": "killed",
    "Bus error": "killed",
}
NOT_THE_RUNS_FAULT = ("signal", "lost")  # the same cause twice at the same step proves nothing


@dataclass(frozen=True)
class Death:
    """Why an attempt ended. `step` counts the finished optimizer steps."""

    cause: str
    step: int
    error: str
    rank: int | None = None
    host: str | None = None
    details: str = ""  # a traceback or a stack

    def event(self) -> dict[str, object]:
        """What the run's events record of it."""
        return {key: value for key, value in asdict(self).items() if key != "details" and value is not None}


def ended_by_slurm(log: str) -> str | None:
    """Why Slurm ended a job, from its message in the log; "" if a user cancelled it, None if Slurm did not end it."""
    # "*** JOB 3 ON n1 CANCELLED AT 2026-11-20T18:58:19 DUE TO TIME LIMIT ***"; newer ones name the signal of a cancel.
    message = re.search(r"\*\*\* JOB \S+ ON \S+ CANCELLED AT \S+ (?:DUE to SIGNAL [^*]*)?(.*)\*\*\*", log)
    return message[1].strip() if message else None


def examine(folder: Path, restart: int, exit_code: int, step: int, log: str) -> Death:
    """Why an attempt ended, whose ranks ended with `exit_code` (of `srun`).

    Args:
        folder: of the job, with `attempt-M-rank-N.json`, `attempt-M-rank-N.stack` and `rank-N.err`.
        step: the last one known to be finished.
        log: what Slurm and the first rank printed in this attempt.
    """
    reports = failure.read(folder, restart)
    if reports and not reports[0]["following"]:
        return _reported(reports[0])
    stacks = [path for path in folder.glob(f"attempt-{restart}-rank-*.stack") if path.stat().st_size]
    if stacks and ("Alarm clock" in log or exit_code == 128 + signal.SIGALRM):  # else the rank recovered
        error = f"{len(stacks)} ranks gave no sign of life for too long: their stacks are {folder}/*.stack"
        return Death("hung", step, error, details=min(stacks).read_text(errors="replace")[-4000:])
    # The first rank that failed, as srun reports it: "srun: error: n2: task 3: Killed".
    line = re.search(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)", log)
    by_signal = signal.strsignal(exit_code - 128) if 128 < exit_code < 128 + signal.NSIG else None
    host, rank, end = (line[1], int(line[2]), line[3]) if line else (None, None, by_signal or "")
    if re.search("oom.kill event|Out Of Memory", log):
        return Death("out_of_memory", step, "the kernel killed a process for lack of memory", rank, host)
    cause = next((cause for name, cause in CAUSE_OF_SIGNAL.items() if end.startswith(name)), None)
    if cause is None and reports:
        return _reported(reports[0])
    if cause is None:
        cause, end = ("failed", f"exit code {exit_code}") if exit_code < 128 else ("killed", end)
    return Death(cause, step, f"a rank ended: {end}", rank, host, _last_lines(folder, rank, restart))


def _reported(report: failure.Report) -> Death:
    return Death(
        report["cause"], report["step"], report["error"], report["rank"], report["host"], details=report["traceback"]
    )


def _last_lines(folder: Path, rank: int | None, restart: int) -> str:
    """The end of a rank's stderr in this attempt, without torch's warnings."""
    path = folder / f"rank-{rank}.err"
    if not path.exists():
        return ""
    written = path.read_text(errors="replace").rpartition(f"restart {restart} ")[2]
    return "\n".join([line for line in written.splitlines()[1:] if not line.startswith("[W")][-40:])


def decide(death: Death, events: Sequence[Event], max_requeues: Mapping[str, int]) -> tuple[bool, str]:
    """Whether to requeue the job with these `events`, and why."""
    same = [event for event in events if event["event"] == "requeue" and event["cause"] == death.cause]
    if death.cause not in NOT_THE_RUNS_FAULT and any(event["step"] == death.step for event in same):
        return False, f"the same failure twice at step {death.step}: a retry can't help"
    allowed = max_requeues[death.cause]
    setting = f"cluster.max_requeues.{death.cause}={allowed}"
    if len(same) >= allowed:
        return False, f"requeued {len(same)} times for it ({setting})" if same else f"a retry can't help ({setting})"
    return True, f"{len(same) + 1} of {setting}"
