"""A finished run extended: a new run, with a name of its own, that begins at another's checkpoint.

Weights and optimizer states are that checkpoint's, and the new run goes on after its step, with the samples that the
other would have taken if it had been longer. Hyperparameters are the new run's. This module imports nothing heavy.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sft.config.check import shown
from sft.config.literal import escaped, instantiate
from sft.errors import UserError
from sft.runs import provenance, saved
from sft.runs.identity import deciding
from sft.runs.manifest import Damaged
from sft.runs.run import Run
from sft.runs.secrets import without_secrets

if TYPE_CHECKING:
    from sft.checkpoint.checkpoint import Checkpoint

LENGTH = ("epochs", "max_steps")
# What may be another than the extended run's; of the optimizer all but its class.
FREE = (*LENGTH, "extend", "schedule", "optimizer", "trainer.gradient_clip", "loss", "averaging")
NUM_LOOKED_AT = 50  # newest runs, for the hint


@dataclass(frozen=True)
class Extended:
    """The run that is extended, and the step of its checkpoint."""

    run: Run
    step: int

    def checkpoint(self) -> "Checkpoint":
        from sft.checkpoint.checkpoint import Checkpoint

        return Checkpoint(self.run.checkpoints / f"step-{self.step:08d}")

    def check(self, fingerprint: Mapping[str, str], num_steps: int) -> None:
        """UserError where the data is another, or there is no step left to train."""
        if provenance.recorded(self.run.folder).get("data") != dict(fingerprint):
            raise UserError(f"extend.run={self.run.folder}: the data has changed since it began: put the data back")
        if num_steps <= self.step:
            raise UserError(
                f"extend.run={self.run.folder}: epochs and max_steps mean {num_steps} steps, and it has made "
                f"{self.step}: they count the extended run's steps, too; set more"
            )


def settle(config: DictConfig) -> Extended | None:
    """The run that `extend.run` names. Writes the step of its checkpoint, by default the last, into the settings, which
    name the new run. UserError where it isn't finished, or trains something else."""
    if not config.get("extend") or not config.extend.run:
        return None
    run = Run.find(config.extend.run, config.runs_dir)
    if (Path(config.runs_dir) / run.folder.name).resolve() == run.folder.resolve():
        config.extend.run = escaped(run.folder.name)
    if run.status.get("state") != "finished":
        raise UserError(f"extend.run={run.folder} is not finished: its own command resumes it")
    config.extend.step = config.extend.step or run.steps[-1]
    run.check_step(str(config.extend.step))
    state = saved.state(run.checkpoints / f"step-{config.extend.step:08d}")
    if state.get("optimizer_dropped"):
        raise UserError(
            f"extend.run={run.folder}: its optimizer states were dropped (checkpoint.drop_optimizer), so it can't be "
            f"extended: train from its export with model.path={run.export}"
        )
    before, now = deciding(without_secrets(run.config)), deciding(_plain(config))
    for name in sorted(before.keys() | now.keys()):
        free = name.startswith(FREE) and name != "optimizer._target_"
        if not free and before.get(name) != now.get(name):
            raise UserError(
                f"extend.run={run.folder} has {name}={shown(before.get(name))}, not {shown(now.get(name))}: a run is "
                f"extended with the same model, data, optimizer and global batch; only {', '.join(LENGTH)}, schedule "
                "and the optimizer's numbers may be others"
            )
    return Extended(run, int(config.extend.step))


def first_step(config: DictConfig) -> int:
    """From which the schedule counts."""
    extend = config.get("extend") or {}
    return int(extend["step"]) if extend.get("run") and extend["schedule"] == "restart" else 0


def schedule(config: DictConfig, num_steps: int) -> Callable[[int, int], float]:
    """The factor of the learning rate: over all steps or, with extend.schedule=restart, over the new ones alone."""
    made = instantiate(config.schedule)
    first = first_step(config)

    def factor(step: int, num_steps: int) -> float:
        return float(made(max(0, step - first), num_steps - first))

    try:
        factor(0, num_steps)
    except TypeError as error:
        raise UserError(
            f"schedule {config.schedule._target_} refuses (step, num_steps) or its settings: {error}"
        ) from error
    return factor


def hint(config: DictConfig, run: Run) -> str | None:
    """That a finished run which differs in nothing but its length could be extended; None if the run isn't new."""
    if run.folder.exists() or (config.get("extend") and config.extend.run):
        return None
    now = deciding(_plain(config))
    folders = [path.parent for path in Path(config.runs_dir).glob("*/config.yaml")]
    for folder in sorted(folders, key=lambda folder: -folder.stat().st_mtime)[:NUM_LOOKED_AT]:
        other = Run(folder)
        try:
            before = deciding(without_secrets(other.config))
        except Damaged:
            continue
        is_longer = before != now and _without_length(before) == _without_length(now)
        if other.status.get("state") == "finished" and is_longer:
            return (
                f"note: {folder} is finished and differs in its length alone: extend.run={folder.name} would continue "
                f"from its step {other.status['step']}; this run begins anew"
            )
    return None


def _without_length(settings: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in settings.items() if name not in LENGTH}


def _plain(config: DictConfig) -> Any:
    return without_secrets(json.loads(json.dumps(OmegaConf.to_container(config, resolve=True))))
