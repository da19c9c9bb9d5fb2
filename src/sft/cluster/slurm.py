"""What Slurm says of a job: of its account, of other jobs of the same run, and of the whole request, before it is
queued; then its number."""

import getpass
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sft.cluster.sbatch import Job
from sft.errors import UserError
from sft.runs import events

ANSWER = 20  # seconds that Slurm may take
UNAVAILABLE = "Requested node configuration is not available"
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


def ask(*command: str) -> str:
    """What a command of Slurm prints; `NoAnswer` where it fails."""
    try:
        asked = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, timeout=ANSWER
        )
    except (subprocess.SubprocessError, FileNotFoundError) as error:
        told = " ".join((getattr(error, "stderr", None) or str(error)).split())
        raise NoAnswer(f"Slurm does not answer ({command[0]}: {told}): see whether sinfo works") from error
    return asked.stdout


def check_account(account: str | None) -> None:
    """Refuses an account that the user is not in, where Slurm keeps accounts."""
    if not account or not shutil.which("sacctmgr"):
        return
    query = ["show", "assoc", f"user={getpass.getuser()}", "format=account"]
    try:
        asked = subprocess.run(
            ["sacctmgr", "--noheader", "--parsable2", *query], capture_output=True, text=True, check=True, timeout=5
        )
    except subprocess.SubprocessError:  # no accounting, or it is down: sbatch will know
        return
    accounts = sorted(set(asked.stdout.split()))
    if accounts and account not in accounts:
        raise UserError(f"--account={account} is not yours: you are in {', '.join(accounts)}")


def refuse_queued(run: Path, *states: str, own: int | None = None) -> None:
    """Refuses a run that another job trains already or, with no `states`, waits for; by the run's own story."""
    last = {event["job"]: event["event"] for event in events.read(run) if "job" in event}
    jobs = {job for job, event in last.items() if event not in ("finish", "stop")} - {own}
    if not jobs:
        return
    for line in ask("squeue", "--noheader", f"--user={getpass.getuser()}", "--format=%A|%T").splitlines():
        number, state = line.split("|")
        if int(number) in jobs and (state in states or not states):
            raise UserError(
                f"job {number} ({state}) trains {run} already: let it, or end it first with scancel {number}"
            )


def expected_start(command: Sequence[str], job: Job, waits: bool) -> str | None:
    """Slurm's own word on the request, which it doesn't queue: when it would start. `waits`: for nodes that are away,
    which Slurm takes for none here, but not in the queue. `UserError` where it refuses."""
    asked = _sbatch(["sbatch", "--test-only", *command[1:]], job)
    told = asked.stderr.strip()
    if asked.returncode == 0:
        found = re.search(r"to start at (\S+)", told)
        return found[1] if found else None
    if waits and UNAVAILABLE in told:
        return None
    raise refused(told)


def queue(command: Sequence[str], job: Job) -> int:
    """The number of the new job."""
    asked = _sbatch(command, job)
    if asked.returncode:
        raise refused(asked.stderr.strip())
    return int(asked.stdout.strip().partition(";")[0])


def _sbatch(command: Sequence[str], job: Job) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, env=os.environ | job.environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def refused(told: str) -> UserError:
    """sbatch's message in one line, and what to do where that is known."""
    lines = [re.sub(r"^(sbatch: )?((error|fatal): )?(allocation failure: )?", "", line) for line in told.splitlines()]
    message = "; ".join(line for line in lines if line and not line.startswith("Try "))
    advice = next((advice for known, advice in ADVICE if known in message), "see sbatch --help")
    return UserError(f"Slurm refuses the job: {message}: {advice}")
