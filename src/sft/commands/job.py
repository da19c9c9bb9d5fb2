"""The batch scripts' own steps, before the ranks start and after they end.

  sft job setting INDEX [settings of a sweep]   prints one setting of slurm/sweep.sbatch, an override a line
  sft job begin [settings of sft train]         refuses what can't work; prints the run's folder
  sft job end FOLDER EXIT_CODE LOG              reports why the ranks ended; exit code 0: the run is finished, 75:
                                                requeue the job, 1: neither

`optimizer.lr=1e-5,2e-5 seed=0,1` are four settings, 0 to 3, in the order of `sft train -m`: the last varies first.
EXIT_CODE is that of `srun`, or KILLED where the batch script itself was; LOG the file for its errors and Slurm's.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sft.cluster.requeue_policy import Death, decide, ended_by_slurm, examine
from sft.cluster.slurm import NoAnswer, refuse_queued
from sft.config.arguments import parse
from sft.errors import UserError
from sft.runs import events, signals
from sft.runs.events import Event, SlurmJob
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run
from sft.training import extension
from sft.training.settings import check
from sft.training.trackers.notify import gave_up

KILLED = "killed"


def main(config: DictConfig) -> None:
    """`sft job begin`. Makes the job's folder too; exit code 1 if the job has failed too often."""
    extension.settle(config)
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
    for file in logs(run.folder).glob(f"attempt-{job['restart']}-rank-*"):  # of an older job with this number
        file.unlink()
    max_requeues = settings["cluster"]["max_requeues"]
    allocation = {name.lower(): os.environ.get(f"SLURM_{name}") for name in ("JOB_NODELIST", "NTASKS")}
    unexplained = _unexplained(story, job)
    if unexplained and not _conclude(run.folder, unexplained, story, max_requeues):
        sys.exit(1)
    events.record(run.folder, "job", **allocation, max_requeues=max_requeues)
    if signals.received():
        events.record(run.folder, "signal", step=_step(run.folder))
    print(run.folder, flush=True)
    sys.exit(signals.EXIT_CODE if signals.received() else 0)


def without_configuration(arguments: list[str]) -> None:
    """The steps that need no configuration."""
    match arguments:
        case ["setting", index, *overrides]:
            print("\n".join(pick(int(index), parse("train", ["--multirun", *overrides]).settings)))
        case ["end", folder, exit_code, log]:
            end(Run(Path(folder)), None if exit_code == KILLED else int(exit_code), Path(log))
        case _:
            raise UserError("sft job is for batch scripts: see slurm/train.sbatch")


def pick(index: int, overrides: list[str]) -> list[str]:
    """The overrides of one setting of a sweep; `UserError` if there is no such setting."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(overrides)
    (settings,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    if not 0 <= index < len(settings):
        raise UserError(
            f"there is no setting {index}: these are {len(settings)} settings, sbatch --array=0-{len(settings) - 1}"
        )
    if odd := [setting for setting in settings[index] if "\n" in setting]:
        raise UserError(
            f"{odd[0].partition('=')[0]}: its value has a line break, at which the batch script divides them"
        )
    return settings[index]


def end(run: Run, exit_code: int | None, log: Path) -> None:
    """Reports in the run's events, and as the last line of the log, why the ranks ended; exit code 1 unless the run is
    finished, 75 if the job is to be requeued. `exit_code`: None where the batch script has left no verdict."""
    if run.status.get("state") == "finished":
        return
    job = events.job()
    story = _of_job(events.read(run.folder), job)
    start = max(at for at, event in enumerate(story) if event["event"] == "job")
    if exit_code is None and any(event["event"] in ("requeue", "stop") for event in story[start:]):
        sys.exit(1)  # it has, and was killed after it
    printed = log.read_text(errors="replace") if log.is_file() else ""
    printed = printed.rpartition(f"job {job['job']} restart {job['restart']} ")[2]
    step = _step(run.folder)
    for event in story[start:]:
        if event["event"] in ("time_up", "by_hand"):
            events.record(run.folder, "stop", cause=event["event"], step=step, why=event["why"])
            print(f"stopped at step {step}: {event['why']}; submit the job again to resume", flush=True)
            sys.exit(1)
    by_slurm = ended_by_slurm(printed)
    if any(event["event"] == "signal" for event in story[start:]):
        death = Death("signal", step, "its checkpoint is saved")
    elif by_slurm and "TIME LIMIT" in by_slurm:
        error = "killed at the time limit: --signal=USR1@SECONDS must leave time for a step, a save or the export"
        death = Death("timeout", step, error)
    elif by_slurm:  # the loss of a node, a preemption that gave no time, or a requeue by hand
        death = Death("lost", step, f"Slurm ended the job {by_slurm.lower()}")
    elif exit_code is None:
        death = Death("killed", step, "the batch script was killed")
    else:
        death = examine(logs(run.folder), job["restart"], exit_code, step, printed)
    if by_slurm == "":
        events.record(run.folder, "stop", **death.event(), why="the job was cancelled")
        print(f"stopped at step {death.step}: the job was cancelled; submit it again to resume", flush=True)
    elif _conclude(run.folder, death, story, story[start]["max_requeues"]):
        sys.exit(signals.EXIT_CODE)
    sys.exit(1)


def logs(run: Path) -> Path:
    """The folder for the errors of this job's ranks."""
    return run / "logs" / os.environ["SLURM_JOB_ID"]


def _of_job(story: Sequence[Event], job: SlurmJob) -> list[Event]:
    """The events since this job began. An older job may have had its number, in a cluster that was set up anew."""
    own = [event for event in story if event.get("job") == job["job"]]
    begins = [at for at, event in enumerate(own) if event["event"] == "job" and event["restart"] == 0]
    return own[begins[-1] :] if begins else []


def _unexplained(story: Sequence[Event], job: SlurmJob) -> Death | None:
    """Why an earlier attempt of this job ended, if no event says so: when a node is lost, Slurm itself requeues."""
    earlier = [event for event in story if event["restart"] < job["restart"]]
    start = max((at for at, event in enumerate(earlier) if event["event"] == "job"), default=None)
    attempt = earlier[start:]
    decisions = [event for event in attempt if event["event"] in ("requeue", "stop")]
    if decisions and decisions[-1]["event"] == "stop":
        raise UserError(f"this job was stopped ({decisions[-1]['why']}): submit it again to resume the run")
    if start is None or decisions:
        return None
    step = max((event["step"] for event in attempt if event["event"] in ("start", "save", "signal")), default=0)
    if any(event["event"] == "signal" for event in attempt):
        return Death("signal", step, "requeued by Slurm after it had stopped the run")
    nodes = attempt[0].get("job_nodelist")
    return Death("lost", step, f"the attempt on {nodes} left no message: a node was lost, or Slurm requeued the job")


def _conclude(folder: Path, death: Death, story: Sequence[Event], max_requeues: Mapping[str, int]) -> bool:
    """Decides whether to requeue, records and prints the decision, and returns it."""
    requeue, why = decide(death, story, max_requeues)
    events.record(folder, "requeue" if requeue else "stop", **death.event(), why=why)
    if death.details:
        print(death.details.rstrip(), file=sys.stderr)
    place = f" (rank {death.rank} on {death.host})" if death.rank is not None else ""
    decision = "requeued" if requeue else "stopped"
    print(f"{decision}: {death.cause} at step {death.step}{place}: {death.error}; {why}", file=sys.stderr, flush=True)
    if not requeue:
        gave_up(folder, death.step, f"{death.cause}{place}: {death.error}; {why}")
    return requeue


def _step(folder: Path) -> int:
    """The last finished optimizer step."""
    return Metrics.read(folder / "metrics.csv").step
