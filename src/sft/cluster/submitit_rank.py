"""The life of a rank in a job that `hydra/launcher=slurm` has submitted."""

import atexit
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sft.runs import signals


def is_submitted() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


@contextmanager
def rank() -> Iterator[None]:
    """Remembers signals as a typed command does, in the place of submitit, which would requeue the job in the middle of
    a step. A run that a signal has stopped goes back into the queue, and leaves no result: what waits for it waits on.
    """
    signals.install()
    code = 1

    def end() -> None:
        # After submitit has written the result. Threads of a process group can crash an interpreter's own end; and with
        # another code than 0 srun ends the ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(end)
    try:
        yield
    except signals.Interrupted as stopped:
        if os.environ["SLURM_PROCID"] != "0":
            code = 0
        else:
            code = stopped.exit_code
            requeue()
        sys.exit(code)
    code = 0
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def requeue() -> None:
    """Puts this job back into the queue, unless it was cancelled: Slurm would requeue that, too."""
    job = os.environ["SLURM_JOB_ID"]
    asked = subprocess.run(["squeue", "--noheader", f"--jobs={job}", "--format=%T"], capture_output=True, text=True)
    if asked.stdout.strip() == "RUNNING":
        print(f"job {job} goes back into the queue", flush=True)
        subprocess.run(["scontrol", "requeue", job], check=True)
