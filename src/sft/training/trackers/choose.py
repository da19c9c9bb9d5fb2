"""Which trackers a run has besides its metrics.csv: those that `logger` names, as many as there are."""

import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from sft.config.literal import instantiate
from sft.errors import NotFinite, UserError
from sft.runs.run import WANDB_LACKS, Run
from sft.runs.secrets import without_secrets
from sft.training.log import log
from sft.training.trackers import about
from sft.training.trackers.alerts import Alerts
from sft.training.trackers.guard import guarded
from sft.training.trackers.nodes import Nodes
from sft.training.trackers.waiting import bounded, line
from sft.training.trackers.wandb_files import was_full
from sft.training.trackers.wandb_server import leave

LONGEST = 40.0  # seconds in which wandb must end its run, whose own limit is shorter


def start(config: DictConfig, run: Run, history: list[dict[str, str]]) -> list[Logger]:
    """The trackers, those of the user's own too: a logger, or with `_partial_: true` a function that gets what our own
    get, as far as it has parameters for it. None of them raises anything from here on."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    node, made = settings.get("logger") or {}, instantiate(config.get("logger"), _convert_="all")
    several: dict[str, Any] = {"logger": made} if "_target_" in node else made or {}
    shared = {} if "_target_" in node else {name: value for name, value in node.items() if not _is_logger(value)}
    told = {
        **shared,
        "run": run.folder.name,
        "name": about.label(run.folder.name, named=settings.get("run") is not None),
        "folder": run.folder,
        "group": (node.get("group")) or config.name,
        "history": history,
        "config": without_secrets(settings),
    }
    loggers = []
    for name, logger in several.items():
        if name not in shared:
            loggers.append(_begun(name, logger, told))
    trackers = [logger for logger in loggers if logger is not None]
    parts: list[Logger] = [Alerts(run.folder, trackers, history)]
    if config.trainer.num_nodes > 1:
        parts.append(Nodes(run.folder, trackers))
    return [*trackers, *(part for each in parts if (part := guarded(each, type(each).__name__.lower())))]


def _is_logger(value: object) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _begun(name: str, made: Any, told: Mapping[str, Any]) -> Logger | None:
    """The logger of that name, guarded; None, with a line, where it can't begin. UserError for its settings."""
    try:
        logger = _called(made, told) if isinstance(made, partial) else made
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"logger.{name} refuses its settings: {line(error)}") from error
    except Exception as error:  # of the disk, of the network
        log(f"{name} can't be used; the run continues without it until it is resumed: {line(error)}")
        return None
    return guarded(logger, type(logger).__name__ if name == "logger" else name)


def _called(function: partial[Logger], told: Mapping[str, Any]) -> Logger:
    parameters = signature(function).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
        return function(**{name: value for name, value in told.items() if name not in function.keywords})
    names = {parameter.name for parameter in parameters} - function.keywords.keys()
    return function(**{name: value for name, value in told.items() if name in names})


@contextmanager
def tracking() -> Iterator[list[Logger]]:
    """Takes the run's trackers, gives them its files at its end, and finishes the W&B run, if there is one: the next
    run of a multirun must not continue it."""
    trackers: list[Logger] = []
    try:
        yield trackers
        _each(trackers, "log_files")
    except NotFinite as error:
        for logger in trackers:
            if isinstance(logger, Alerts):
                logger.not_finite(error)
        raise
    finally:
        _each(trackers, "close")
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            folder = Path(wandb.run.dir).parent
            try:
                bounded(LONGEST, wandb.finish)
                if folder.name.startswith("run-"):  # offline its copies are for `wandb sync`
                    shutil.rmtree(folder.parent / "staging", ignore_errors=True)
                if was_full(folder):
                    (folder.parents[1] / WANDB_LACKS).touch()
                    log("W&B lacks steps, since its disk was full; metrics.csv has all, and the same command sends it")
            except Exception as error:
                log(f"W&B hasn't got all of this run ({line(error)}): wandb sync --include-online {folder}")
                if isinstance(error, TimeoutError) and wandb.run is not None:  # its own limit had no effect
                    leave()


def _each(trackers: list[Logger], method: str) -> None:
    for logger in trackers:
        if hasattr(logger, method):
            getattr(logger, method)()
