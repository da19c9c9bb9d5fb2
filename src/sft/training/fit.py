"""One fit: trainer, module and callbacks of a configuration, put together for every command that trains."""

import os
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback

from sft.checkpoint.checkpoint import Checkpoint
from sft.runs import events, watchdog
from sft.training.checkpointing import Checkpoints
from sft.training.metrics import StepMetrics
from sft.training.module import SFTModule
from sft.training.strategies import build


def fit(
    config: Any,
    source: Any,
    data: Any,
    *,
    accumulation: int,
    checkpoints: Path,
    resume: Checkpoint | None,
    loggers: list[Any],
    facts: dict[str, Any],
) -> None:
    """Trains to the run's last step, from `resume` on where there is one.

    Args:
        source, data: the model's `ModelSource` and the `SFTDataModule`.
        accumulation: micro-batches of a rank in a step.
        checkpoints: the folder they are saved in.
        facts: of the run, kept in each checkpoint.
    """
    # With deterministic kernels torch fills what it allocates, which of DeepSpeed's buffers would be GBs in each step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    val_every = config.val_every or data.steps_per_epoch
    callbacks: list[Callback] = [
        *(instantiate(config.callbacks) or {}).values(),
        StepMetrics(),
        Checkpoints(
            checkpoints,
            config.checkpoint.save_every or val_every,
            val_every,
            config.checkpoint.keep_last,
            resume,
            facts,
        ),
    ]
    trainer = instantiate(
        config.trainer,
        strategy=build(config.strategy, config.trainer.accelerator),
        logger=loggers,
        callbacks=callbacks,
        accumulate_grad_batches=accumulation,
        max_epochs=1,  # the loader goes through all epochs
        val_check_interval=val_every * accumulation,
        check_val_every_n_epoch=None,
        limit_val_batches=None if data.val else 0,
        num_sanity_val_steps=0 if resume else -1,  # the validation before training
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    module = SFTModule(
        source,
        instantiate(config.optimizer, _convert_="all"),
        instantiate(config.schedule),
        data.num_steps,
        config.seed,
        resumed=resume is not None,
    )
    logs = Path(os.environ.get("SFT_JOB_FOLDER", checkpoints.parent / "logs"))
    stack = f"attempt-{events.job().get('restart', 0)}-rank-{rank_zero_only.rank}.stack"  # type: ignore[attr-defined]
    watchdog.start(logs / stack, config.cluster.hang_after)
    try:
        trainer.fit(module, data)
    finally:
        watchdog.stop()
