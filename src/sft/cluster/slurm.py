"""What Slurm says before a job is queued: about other jobs of the same run, and about the request; then the job's
number."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sft.cluster.sbatch import Job
from sft.errors import UserError
from sft.runs import events

TIMEOUT = 20  # seconds for Slurm to answer
UNAVAILABLE = "Requested node configuration is not available"
COMMENT = "sft train "
ADVICE = (
    (UNAVAILABLE, "no nodes have all of it together (memory, kind of GPU, constraint): see scontrol show node"),
    ("Invalid account", "set --account, one of: sacctmgr show assoc user=$USER format=account,partition,qos"),
    ("Invalid qos", "set --qos, one of: sacctmgr show assoc user=$USER format=account,partition,qos"),
    ("Unable to open file", "it is no option of sbatch, and settings of sft train come after --"),
    ("unrecognized option", "see sbatch --help; settings of sft train come after --"),
    ("time limit", "set --time"),
)


class NoAnswer(UserError):
    """Slurm's controller can't be reached."""


def check_installed() -> None:
    if not shutil.which("sbatch"):
        raise UserError(
            "sbatch is not found: give the command on a login node of the cluster; "
            "slurm/local-cluster makes a small cluster of this machine to try it on"
        )


class QueuedJob(NamedTuple):
    """A job of this user, as squeue has it."""

    number: int
    state: str  # PENDING, RUNNING, ...
    reason: str  # why it waits; None, as a text, where it doesn't
    comment: str


def ask(*command: str, timeout: float = TIMEOUT) -> str:
    """The output of one of Slurm's commands; `NoAnswer` if it fails."""
    try:
        answer = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=timeout
        )
    except (subprocess.SubprocessError, FileNotFoundError) as error:
        reason = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise NoAnswer(f"Slurm does not answer ({command[0]}: {reason}): see whether sinfo works") from error
    return answer.stdout


def comment(run: Path) -> str:
    """The comment on the job of a sweep's setting, by which `refuse_queued` knows the run."""
    return f"{COMMENT}{run.resolve()}"


def queued(timeout: float = TIMEOUT) -> list[QueuedJob]:
    """This user's jobs in the queue, those that run too; `NoAnswer` where Slurm gives none."""
    lines = ask("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A|%T|%r|%k", timeout=timeout).splitlines()
    fields = [line.split("|", 3) for line in lines]
    return [QueuedJob(int(number), state, reason, its_comment) for number, state, reason, its_comment in fields]


def queue_if_known(timeout: float) -> list[QueuedJob] | None:
    """The same; None where there is no Slurm, or it doesn't answer."""
    try:
        return queued(timeout) if shutil.which("squeue") else None
    except NoAnswer:
        return None


def of_run(run: Path, story: Iterable[events.Event], jobs: Iterable[QueuedJob]) -> list[QueuedJob]:
    """Those of the jobs that train a run or will. A job of sft submit or slurm/train.sbatch is known by the run's
    events, a sweep's that hasn't started by its comment."""
    last = {event["job"]: event["event"] for event in story if "job" in event}
    numbers = {number for number, event in last.items() if event not in ("finish", "stop")}
    return [job for job in jobs if job.number in numbers or job.comment == comment(run)]


def refuse_queued(run: Path, *states: str, own: int | None = None) -> None:
    """Refuses a run for which the queue holds another job, in one of these `states` if any are given."""
    for job in of_run(run, events.read(run), queued()):
        if job.number != own and (job.state in states or not states):
            raise UserError(
                f"job {job.number} ({job.state}) trains {run} already: let it, or end it first with scancel "
                f"{job.number}"
            )


def expected_start(command: Sequence[str], job: Job, waits: bool) -> str | None:
    """When Slurm would start the job if it were queued; `UserError` if Slurm refuses it. `waits`: for nodes that are
    down, without which this check says unavailable, though the queue would take the job."""
    check = _sbatch(["sbatch", "--test-only", *command[1:]], job)
    if check.returncode == 0:
        start = re.search(r"to start at (\S+)", check.stderr)
        return start[1] if start else None
    if waits and UNAVAILABLE in check.stderr:
        return None
    raise refused(check.stderr)


def queue(command: Sequence[str], job: Job) -> int:
    """Queues the job and returns its number."""
    submission = _sbatch(command, job)
    if submission.returncode:
        raise refused(submission.stderr)
    return int(submission.stdout.strip().partition(";")[0])


def _sbatch(command: Sequence[str], job: Job) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=os.environ | job.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def refused(stderr: str) -> UserError:
    """sbatch's message in one line, with advice if the message is known."""
    lines = [re.sub(r"^(sbatch: )?((error|fatal): )?(allocation failure: )?", "", line) for line in stderr.splitlines()]
    message = "; ".join(line for line in lines if line and not line.startswith("Try "))
    advice = next((advice for words, advice in ADVICE if words in message), "see sbatch --help")
    return UserError(f"Slurm refuses the job: {message}: {advice}")
