"""How a rank lives and ends in a job that `hydra/launcher=slurm` submitted."""

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sft.runs import process, signals


def is_submitted() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


@contextmanager
def rank() -> Iterator[None]:
    """Handles signals as a typed command does; submitit's own handler would requeue the job in the middle of a step. A
    run stopped by a signal is requeued and leaves no result, so the sweep keeps waiting for it; one whose `max_time` is
    over has failed."""
    signals.install()
    code = 1
    # Runs after submitit has written the result. With an exit code other than 0, srun ends the ranks that wait.
    atexit.register(lambda: process.leave(code))
    try:
        yield
    except signals.Interrupted as stopped:
        if not stopped.by_signal:
            raise RuntimeError(str(stopped)) from None
        if os.environ["SLURM_PROCID"] == "0":
            code = stopped.exit_code
            requeue()
        else:
            code = 0
        sys.exit(code)
    code = 0
    ranks = sys.modules.get("sft.ranks")
    if ranks is not None:
        ranks.disband()


def requeue() -> None:
    """Requeues this job, unless it was cancelled: Slurm would requeue it even then."""
    job = os.environ["SLURM_JOB_ID"]
    squeue = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    if squeue.stdout.strip() == "RUNNING":
        print(f"requeueing job {job}", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=True)
