"""The sweeper of `sft train -m`. It refuses a mistake in any setting before the first one starts, continues after a
setting that fails, and ends with the table of `sft compare`.

Hydra takes plugins from packages of this name only, and imports them at every start: nothing heavy is imported here.
"""

import signal
import sys
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from sft.cluster import slurm
from sft.errors import UserError
from sft.runs import process, signals
from sft.runs.identity import deciding
from sft.runs.plain import plain
from sft.runs.results import Result, best_first
from sft.runs.run import Run


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep and its run."""

    number: int
    overrides: list[str]
    shown: str  # the overrides in which the settings differ
    run: Run
    deciding: dict[str, object]  # the settings that decide the run's numbers


@dataclass(frozen=True)
class Ended:
    setting: Setting
    loss: float | None  # the final validation loss
    failure: str | None  # why it failed; "" if unknown


class Grid(BasicSweeper):
    """All combinations: one after the other in this process, or all at once in the queue."""

    config: DictConfig  # these three are set before `sweep`
    hydra_context: HydraContext
    launcher: Any  # Hydra's BasicLauncher, or submitit's for Slurm

    def __init__(self) -> None:
        super().__init__(max_batch_size=None)

    def sweep(self, arguments: list[str]) -> object:
        if self.config.hydra.job.config_name != "train":  # another command with the same settings, such as preview
            return super().sweep(arguments)
        overrides = self.parse(arguments)
        (combinations,) = self.split_arguments(overrides, max_batch_size=None)
        varied = {override.get_key_element() for override in overrides if override.is_sweep_override()}
        settings = [self.setting(number, chosen, varied) for number, chosen in enumerate(combinations)]
        by_folder: dict[str, Setting] = {}
        for setting in settings:
            other = by_folder.setdefault(str(setting.run.folder), setting)
            if other is not setting:
                raise UserError(
                    f"{other.shown} and {setting.shown} are the same run, {setting.run.folder}: they differ in nothing "
                    "that decides the numbers, or they have one name; vary something else, or add name=A,B"
                )
            self.refuse_queued(setting)
        self.finish([self.result(ended) for ended in self.train(settings, parallel=len(settings))])
        return None

    def parse(self, arguments: list[str]) -> list[Override]:
        return OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(arguments)

    @property
    def queued(self) -> bool:
        """Whether the settings are jobs of a cluster."""
        return not isinstance(self.launcher, BasicLauncher)

    def setting(self, number: int, overrides: list[str], varied: Collection[str]) -> Setting:
        """A setting after its checks; `UserError` if it has a mistake."""
        from sft.training import extension
        from sft.training.settings import check, check_schema, settle_batch
        from sft.training.shape import settle_data

        shown = plain(" ".join(item for item in overrides if item.partition("=")[0] in varied)) or "this setting"
        if self.queued:
            overrides = [*overrides, *self._allocation(overrides)]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        HydraConfig.instance().set_config(config)  # `check` looks up there which options were chosen
        with open_dict(config):
            del config["hydra"]
        check_schema(config, typed={item.partition("=")[0].lstrip("+") for item in overrides})
        settle_data(config)
        settle_batch(config)
        extension.settle(config)
        num_ranks, _ = check(config, here=not self.queued)
        if num_ranks > 1 and not self.queued:
            raise UserError(
                f"-m trains one setting after the other in one process, and the trainer has {num_ranks} ranks: "
                "set hydra/launcher=slurm, or give a command for each setting"
            )
        settings: Any = OmegaConf.to_container(config, resolve=True)
        return Setting(number, overrides, shown, Run.of(settings), deciding(settings))

    def _allocation(self, overrides: list[str]) -> list[str]:
        """The trainer's nodes and devices: each task of the job is a rank."""
        for name in ("trainer.num_nodes", "trainer.devices"):
            if any(override.startswith(f"{name}=") for override in overrides):
                raise UserError(
                    f"{name} follows from the job: leave it out, and set hydra.launcher.nodes and "
                    "hydra.launcher.tasks_per_node"
                )
        slurm.check_installed()
        launcher = self.config.hydra.launcher
        logs = launcher.submitit_folder
        if "%" in logs.replace("%j", ""):
            raise UserError(
                f"the jobs' logs would be in {logs}, where Slurm expands %: set runs_dir to a folder without"
            )
        return [f"trainer.num_nodes={launcher.nodes}", f"trainer.devices={launcher.tasks_per_node}"]

    def refuse_queued(self, setting: Setting) -> None:
        if self.queued:
            slurm.refuse_queued(setting.run.folder)

    def train(self, settings: Iterable[Setting], parallel: int) -> Iterator[Ended]:
        """Trains the settings, and yields each as it ends. Takes the next from `settings` when there is room for it."""
        if not self.queued:
            for setting in settings:
                print(f"\n{setting.shown}", flush=True)
                yield self._launch(setting)
            return
        from submitit.slurm.slurm import SlurmJob

        from sft.cluster.submitit_watcher import Watcher

        SlurmJob.watcher = Watcher()
        for number in signals.SIGNALS:  # this process has nothing to save
            signal.signal(number, signal.SIG_DFL)
        logs = self.config.hydra.launcher.submitit_folder.replace("%j", "JOB/JOB_RANK_log.out")
        print(f"the jobs' logs: {logs}", flush=True)
        running: set[Future[Ended]] = set()
        threads = ThreadPoolExecutor(parallel)
        try:
            for setting in settings:
                print(f"queued: {setting.shown}", flush=True)
                running.add(threads.submit(self._launch, setting))
                if len(running) == parallel:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    yield from map(_reported, finished)
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                yield from map(_reported, finished)
        except KeyboardInterrupt:
            print("\nthe jobs stay in the queue: squeue and sft compare show them, scancel ends them")
            process.leave(130)  # the threads wait for the jobs

    def _launch(self, setting: Setting) -> Ended:
        launcher = copy(self.launcher)
        if self.queued:
            run = setting.run.folder
            comment = launcher.params.get("comment") or slurm.comment(run)
            launcher.params = launcher.params | {"name": run.name, "comment": comment}
        try:
            (job,) = launcher.launch([setting.overrides], setting.number)
        except Exception as error:
            if not self.queued:
                raise
            # Slurm refused the job, a user cancelled it, or a rank died. After two lines the job's log follows.
            return Ended(setting, None, " ".join(str(error).splitlines()[:2]))
        if job.status == JobStatus.FAILED:
            return Ended(setting, None, str(job._return_value))
        return Ended(setting, job.return_value, None)

    def result(self, ended: Ended) -> Result:
        """Of the setting's run, which may have no folder if it failed."""
        run = ended.setting.run
        if (run.folder / "config.yaml").exists():
            result = Result.read(run)
        else:
            result = Result(run.folder.name, ended.setting.deciding)
        if ended.failure is None:
            return result
        return replace(result, state="failed", error=ended.failure or result.error)

    def finish(self, results: Iterable[Result]) -> None:
        """Prints the table, the best run first; exit code 1 if any failed."""
        from sft.commands.compare import show

        print(flush=True)
        show(best_first({result.name: result for result in results}.values()))
        if any(result.state == "failed" for result in results):
            sys.exit(1)


def _reported(future: "Future[Ended]") -> Ended:
    ended = future.result()
    print(f"{'ended' if ended.failure is None else 'failed'}: {ended.setting.shown}", flush=True)
    return ended
