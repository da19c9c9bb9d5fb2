"""What slurm/train.sbatch asks before the ranks start and after they have ended.

  sft job begin [the settings of sft train]     refuses what can't work; prints the run's folder
  sft job end FOLDER EXIT_CODE LOG              tells why the ranks ended; exit code 75: requeue the job

EXIT_CODE is that of `srun`, LOG the file in which it and Slurm tell of errors.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.cluster.requeue_policy import Death, decide, ended, examine
from sft.cluster.slurm import NoAnswer, refuse_queued
from sft.commands.train import check
from sft.errors import UserError
from sft.runs import events, signals
from sft.runs.run import Run


def main(config: Any) -> None:
    """Prints the run's folder, with the job's folder made in it. Exit code 1 where the job has died too often."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    check(config)
    run = Run.of(settings)
    job = events.job()
    if not job:
        raise UserError("sft job begin is for batch scripts: submit slurm/train.sbatch, or use sft train")
    story = _of_job(events.read(run.folder), job)
    with suppress(NoAnswer):  # a container has no squeue, and a controller is away now and then
        refuse_queued(run.folder, "RUNNING", own=job["job"])
    logs(run.folder).mkdir(parents=True, exist_ok=True)
    for earlier in logs(run.folder).glob(f"attempt-{job['restart']}-rank-*"):  # of another job of this number
        earlier.unlink()
    budgets = settings["cluster"]["max_requeues"]
    allocation = {name.lower(): os.environ.get(f"SLURM_{name}") for name in ("JOB_NODELIST", "NTASKS")}
    unfinished = _unexplained(story, job)
    if unfinished and not _concluded(run.folder, unfinished, story, budgets):
        sys.exit(1)
    events.record(run.folder, "job", **allocation, max_requeues=budgets)
    if signals.received():
        events.record(run.folder, "signal", step=_step(run.folder))
    print(run.folder, flush=True)
    sys.exit(signals.EXIT_CODE if signals.received() else 0)


def logs(run: Path) -> Path:
    """Where the ranks of this job leave their errors."""
    return run / "logs" / os.environ["SLURM_JOB_ID"]


def _of_job(story: list[dict[str, Any]], job: dict[str, Any]) -> list[dict[str, Any]]:
    """What has happened since this job began; its number may have been another's in a cluster that was set up anew."""
    own = [each for each in story if each.get("job") == job["job"]]
    begun = [place for place, each in enumerate(own) if each["event"] == "job" and each["restart"] == 0]
    return own[begun[-1] :] if begun else []


def _unexplained(story: list[dict[str, Any]], job: dict[str, Any]) -> Death | None:
    """Why an earlier attempt of this job ended that nobody has concluded: Slurm itself requeues when a node is lost."""
    before = [each for each in story if each["restart"] < job["restart"]]
    start = max((place for place, each in enumerate(before) if each["event"] == "job"), default=None)
    verdicts = [each for each in before[start:] if each["event"] in ("requeue", "stop")]
    if verdicts and verdicts[-1]["event"] == "stop":
        raise UserError(f"this job was stopped ({verdicts[-1]['why']}): submit it again to go on with the run")
    if start is None or verdicts:
        return None
    steps = [each["step"] for each in before[start:] if each["event"] in ("start", "save", "signal")]
    step = max(steps, default=0)
    if any(each["event"] == "signal" for each in before[start:]):
        return Death("signal", step, "requeued by Slurm after it had stopped the run")
    nodes = before[start].get("job_nodelist")
    return Death("lost", step, f"the attempt on {nodes} ended without a word: a node was lost, or Slurm requeued it")


def end(arguments: list[str]) -> None:
    """Tells in the run's story, and as the last thing in the log, why the ranks ended."""
    try:
        verb, folder, exit_code, log = arguments
        assert verb == "end"
        run, code = Run(Path(folder)), int(exit_code)
    except (ValueError, AssertionError):
        raise UserError("sft job is for batch scripts: see slurm/train.sbatch") from None
    if run.status.get("state") == "finished":
        return
    job = events.job()
    story = _of_job(events.read(run.folder), job)
    start = max(place for place, each in enumerate(story) if each["event"] == "job")
    printed = Path(log).read_text(errors="replace") if Path(log).is_file() else ""
    printed = printed.rpartition(f"job {job['job']} restart {job['restart']} ")[2]
    by_slurm = ended(printed)
    if any(each["event"] == "signal" for each in story[start:]):
        death = Death("signal", _step(run.folder), "its checkpoint is saved")
    elif by_slurm and "TIME LIMIT" in by_slurm:
        error = "killed at the time limit: --signal=USR1@SECONDS must leave time for a step, a save or the export"
        death = Death("timeout", _step(run.folder), error)
    elif by_slurm:  # the loss of a node, a preemption that gave no time, or a requeue by hand
        death = Death("lost", _step(run.folder), f"Slurm ended the job {by_slurm.lower()}")
    else:
        death = examine(logs(run.folder), job["restart"], code, _step(run.folder), printed)
    if by_slurm == "":
        events.record(run.folder, "stop", **death.event(), why="the job was cancelled")
        print(f"stopped at step {death.step}: the job was cancelled; submitted again, it goes on", flush=True)
    elif _concluded(run.folder, death, story, story[start]["max_requeues"]):
        sys.exit(signals.EXIT_CODE)


def _concluded(folder: Path, death: Death, story: list[dict[str, Any]], budgets: dict[str, int]) -> bool:
    """Decides, records and tells; whether to requeue."""
    requeue, why = decide(death, story, budgets)
    events.record(folder, "requeue" if requeue else "stop", **death.event(), why=why)
    if death.details:
        print(death.details.rstrip(), file=sys.stderr)
    place = f" (rank {death.rank} on {death.host})" if death.rank is not None else ""
    verdict = "requeued" if requeue else "stopped"
    print(f"{verdict}: {death.cause} at step {death.step}{place}: {death.error}; {why}", file=sys.stderr, flush=True)
    return requeue


def _step(folder: Path) -> int:
    """The last optimizer step that is known to be done: the last row of metrics.csv."""
    try:
        last = (folder / "metrics.csv").read_text().splitlines()[-1].partition(",")[0]
    except (OSError, IndexError):
        return 0
    return int(last) if last.isdigit() else 0
