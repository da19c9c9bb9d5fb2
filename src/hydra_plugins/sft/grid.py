"""The sweeper of `sft train -m`: it refuses what is wrong in any setting before the first one starts, lets none that
fails hide the others, and ends with the table of `sft compare`.

Hydra takes plugins from packages of this name only.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf, open_dict

from sft.errors import UserError
from sft.runs import signals


@dataclass(frozen=True)
class Job:
    """One setting of a sweep and the run that it makes."""

    number: int
    overrides: list[str]
    shown: str  # what is its own
    run: Any  # sft.runs.run.Run
    settings: dict[str, Any]


@dataclass(frozen=True)
class Ended:
    job: Job
    value: Any  # that the command returned: the final validation loss
    failure: str | None  # why it has failed


class Grid(BasicSweeper):
    """All combinations: one after the other in this process, or all at once in the queue."""

    config: Any  # these three are set before `sweep`
    hydra_context: Any
    launcher: Any

    def __init__(self) -> None:
        super().__init__(max_batch_size=None)

    def sweep(self, arguments: list[str]) -> Any:
        if self.config.hydra.job.config_name != "train":  # others that have its settings, such as preview
            return super().sweep(arguments)
        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(arguments)
        (settings,) = self.split_arguments(overrides, max_batch_size=None)
        varied = {each.get_key_element() for each in overrides if each.is_sweep_override()}
        jobs = [self.job(number, each, varied) for number, each in enumerate(settings)]
        first: dict[str, Job] = {}
        for job in jobs:
            if (other := first.setdefault(str(job.run.folder), job)) is not job:
                raise UserError(
                    f"{other.shown} and {job.shown} are the same run, {job.run.folder}: what they differ in decides no "
                    "numbers, or they have one name; vary something else, or add name=A,B"
                )
            self.refuse_queued(job)
        return self.finish([self.result(ended) for ended in self.run(jobs, parallel=len(jobs))])

    @property
    def queued(self) -> bool:
        """Whether the settings are jobs of a cluster."""
        return not isinstance(self.launcher, BasicLauncher)

    def job(self, number: int, overrides: list[str], varied: Iterable[str]) -> Job:
        """A setting that is seen to be right; `UserError` where it isn't."""
        from sft.commands.train import check
        from sft.runs.run import Run

        shown = " ".join(each for each in overrides if each.partition("=")[0] in varied) or "this setting"
        if self.queued:
            overrides = [*overrides, *self._allocation(overrides)]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        HydraConfig.instance().set_config(config)  # of which `check` asks what was chosen
        with open_dict(config):
            del config["hydra"]
        num_ranks, _ = check(config)
        if num_ranks > 1 and not self.queued:
            raise UserError(
                f"-m trains one setting after the other in one process, and the trainer has {num_ranks} ranks: "
                "set hydra/launcher=slurm, or give a command for each setting"
            )
        settings: Any = OmegaConf.to_container(config, resolve=True)
        return Job(number, overrides, shown, Run.of(settings), settings)

    def _allocation(self, overrides: list[str]) -> list[str]:
        """The trainer's ranks: a task of the job each."""
        launcher = self.config.hydra.launcher
        for name in ("trainer.num_nodes", "trainer.devices"):
            if any(each.startswith(f"{name}=") for each in overrides):
                raise UserError(
                    f"{name} is what the job has: leave it out, and set hydra.launcher.nodes and "
                    "hydra.launcher.tasks_per_node"
                )
        if shutil.which("sbatch") is None:
            raise UserError("there is no sbatch here: hydra/launcher=slurm works on a machine that submits Slurm jobs")
        return [f"trainer.num_nodes={launcher.nodes}", f"trainer.devices={launcher.tasks_per_node}"]

    def refuse_queued(self, job: Job) -> None:
        """`UserError` where the job of an earlier sweep is to train the same run, or trains it."""
        if not self.queued:
            return
        command = ["squeue", "--noheader", f"--user={os.getuid()}", "--format=%i|%j|%Z"]
        for line in subprocess.run(command, capture_output=True, text=True).stdout.splitlines():
            number, name, folder = line.split("|", 2)
            if (name, folder) == (job.run.folder.name, os.getcwd()):
                raise UserError(
                    f"job {number} trains {job.run.folder} and is still in the queue: wait for it, or scancel {number}"
                )

    def run(self, jobs: Iterable[Job], parallel: int) -> Iterator[Ended]:
        """What became of each, as they end; a job is taken from `jobs` when there is room for it."""
        if not self.queued:
            for job in jobs:
                print(f"\n{job.shown}", flush=True)
                yield self._launch(job)
            return
        from submitit.slurm.slurm import SlurmJob

        from sft.cluster.submitit_watcher import Watcher

        SlurmJob.watcher = Watcher()
        for each in signals.SIGNALS:  # there is nothing to save here
            signal.signal(each, signal.SIG_DFL)
        logs = self.config.hydra.launcher.submitit_folder.replace("%j", "JOB/JOB_RANK_log.out")
        print(f"the jobs' logs: {logs}", flush=True)
        running: set[Future[Ended]] = set()
        threads = ThreadPoolExecutor(parallel)
        try:
            for job in jobs:
                print(f"queued: {job.shown}", flush=True)
                running.add(threads.submit(self._launch, job))
                if len(running) == parallel:
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from map(self._tell, ended)
            while running:
                ended, running = wait(running, return_when=FIRST_COMPLETED)
                yield from map(self._tell, ended)
        except KeyboardInterrupt:
            print("\nthe jobs stay in the queue: squeue and sft compare show them, scancel ends them", flush=True)
            os._exit(130)  # the threads wait for the jobs

    def _launch(self, job: Job) -> Ended:
        launcher = copy(self.launcher)
        if self.queued:
            launcher.params = self.launcher.params | {"name": job.run.folder.name}
        try:
            (ended,) = launcher.launch([job.overrides], job.number)
        except Exception as error:
            if not self.queued:
                raise
            # It was refused or cancelled, or a rank of it died; after two lines follows its log.
            return Ended(job, None, " ".join(str(error).splitlines()[:2]))
        if ended.status == JobStatus.FAILED:
            return Ended(job, None, str(ended._return_value))
        return Ended(job, ended.return_value, None)

    @staticmethod
    def _tell(future: "Future[Ended]") -> Ended:
        ended = future.result()
        print(f"{'ended' if ended.failure is None else 'failed'}: {ended.job.shown}", flush=True)
        return ended

    def result(self, ended: Ended) -> Any:
        """The `Result` of its run, which may have no folder if it failed."""
        from sft.runs.results import Result
        from sft.runs.run import deciding

        run = ended.job.run
        there = (run.folder / "config.yaml").exists()
        result = Result.read(run) if there else Result(run.folder.name, deciding(ended.job.settings))
        if ended.failure is None:
            return result
        return replace(result, state="failed", error=ended.failure or result.error)

    def finish(self, results: list[Any]) -> None:
        """The table, the best on top; exit code 1 where something failed."""
        from sft.commands.compare import show
        from sft.runs.results import best_first

        print(flush=True)
        show(best_first({result.name: result for result in results}.values()))
        if any(result.state == "failed" for result in results):
            sys.exit(1)
