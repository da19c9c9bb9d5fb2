"""One fit: puts trainer, module and callbacks of a configuration together, for every command that trains."""

import logging
import os
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from tqdm.contrib.logging import logging_redirect_tqdm

from sft.checkpoint.checkpoint import Checkpoint
from sft.config.literal import instantiate
from sft.errors import UserError
from sft.model.loading import ModelSource
from sft.model.loss import Objective
from sft.ranks import together
from sft.runs import computation, events, signals, watchdog
from sft.training import early_stopping, extension
from sft.training.checkpointing import Checkpoints
from sft.training.compilation import compile_optimizer, offloads
from sft.training.datamodule import SFTDataModule
from sft.training.first_batch import FirstBatch
from sft.training.log import log
from sft.training.metrics import StepMetrics
from sft.training.module import SFTModule
from sft.training.recipe import Recipe
from sft.training.reporting import Report
from sft.training.settings import devices_and_nodes, world_size
from sft.training.strategies import build
from sft.training.validation import Validation


def fit(
    config: DictConfig,
    source: ModelSource,
    data: SFTDataModule,
    *,
    checkpoints: Path,
    resume: Checkpoint | None,
    extends: bool = False,
    loggers: list[Logger],
    facts: dict[str, object],
    cluster: ClusterEnvironment | None = None,
    answers: Callback | None = None,
) -> None:
    """Trains to the run's last step, from `resume` on where there is one.

    Args:
        checkpoints: folder of the checkpoints.
        extends: `resume` is a checkpoint of another run, which this one extends.
        facts: about the run, saved in each checkpoint.
        cluster: how the ranks were started; None: Lightning finds out.
        answers: has the model answer held-out prompts; None: nothing is asked.
    """
    # With deterministic kernels torch would fill what it allocates: GBs of DeepSpeed's buffers in each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    val_every = config.val_every or data.steps_per_epoch
    accumulation = data.accumulation(world_size(config))
    users: list[Callback] = list((instantiate(config.callbacks, _convert_="all") or {}).values())
    early_stopping.check(users, bool(data.val))
    evaluation = config.get("evaluation") or {}
    folder = checkpoints.parent
    validation = Validation(folder, facts.get("stop_token_ids") or [], evaluation.get("kl_tokens", 0))  # type: ignore[arg-type]
    averages = [instantiate(config.averaging)] if config.get("averaging") else []
    asking = [answers] if answers else []
    users_bar = any(isinstance(callback, ProgressBar) for callback in users)
    # Some terminals have no width.
    own_bar = sys.stdout.isatty() and shutil.get_terminal_size((0, 0)).columns > 0 and not users_bar
    settings: Any = OmegaConf.to_container(config, resolve=True)
    saving = Checkpoints(
        checkpoints,
        config.checkpoint.save_every or val_every,
        val_every,
        config.checkpoint.keep_last,
        config.checkpoint.export,
        resume,
        facts,
        extends,
        partial(computation.at_start, folder, settings, (config.get("resume") or {}).get("allow") or []),
        partial(computation.check_ranks, settings, together),
    )
    own = [StepMetrics(own_bar, evaluation), *asking, Report(folder)]
    rank = rank_zero_only.rank  # type: ignore[attr-defined]
    strategy = build(config.strategy, config.trainer.accelerator)
    try:
        # In two calls: `instantiate` takes a callback that is a dataclass for settings.
        trainer = instantiate(config.trainer, _partial_=True)(
            strategy=strategy,
            logger=loggers,
            callbacks=[early_stopping.MonitoredMetrics(), validation, *averages, *users, *own],
            accumulate_grad_batches=accumulation,
            max_epochs=1,  # the loader goes through all epochs
            val_check_interval=val_every * accumulation,
            check_val_every_n_epoch=None,
            limit_val_batches=None if data.val else 0,
            num_sanity_val_steps=0 if resume and not extends else -1,  # the validation before training
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=users_bar,
            enable_model_summary=False,
            log_every_n_steps=1,
            plugins=cluster,
        )
    except Exception as error:  # whatever Lightning has against the settings
        raise UserError(f"the trainer refuses its settings: {' '.join(str(error).split())}") from error
    # After those that the trainer's settings have added; the last two need the weights that it restores.
    trainer.callbacks += [saving, FirstBatch(folder), Recipe(config, folder)]
    meant = (*devices_and_nodes(config), world_size(config), rank)
    real = (trainer.num_devices, trainer.num_nodes, trainer.world_size, trainer.global_rank)
    if meant != real:
        parts = ("devices", "nodes", "world size", "rank")
        differing = [f"{part} {m}, not {r}" for part, m, r in zip(parts, meant, real, strict=True) if m != r]
        raise UserError(
            f"the settings mean {', '.join(differing)} as the trainer has it: set trainer.devices and "
            "trainer.num_nodes to what the launcher starts"
        )
    module = SFTModule(
        source,
        instantiate(config.optimizer, _convert_="all"),
        extension.schedule(config, data.num_steps),
        data.num_steps,
        config.seed,
        resumed=resume is not None,
        objective=Objective(**config.loss),
    )
    if offloads(config):
        compile_optimizer(log)  # before the watchdog, which would take its minutes for a hang
    logs = Path(os.environ.get("SFT_JOB_FOLDER", checkpoints.parent / "logs"))
    stack = f"attempt-{events.job().get('restart', 0)}-rank-{rank_zero_only.rank}.stack"  # type: ignore[attr-defined]
    watchdog.start(logs / stack, config.cluster.hang_after)
    above_the_bar = logging_redirect_tqdm([logging.getLogger("lightning.pytorch")]) if own_bar else nullcontext()
    try:
        with above_the_bar:
            trainer.fit(module, data)
    finally:
        watchdog.stop()
        signals.save_first(False)
