"""Trainer, module and data of a run as `sft train` makes them, on a model and a token store on disk."""

from pathlib import Path
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from sft.config import CONF
from sft.data.rows import Source
from sft.data.store import Store
from sft.training.datamodule import SFTDataModule
from sft.training.module import SFTModule
from sft.training.prepare import model_source, quiet
from sft.training.strategies import build


def parts(
    folder: Path,
    overrides: list[str],
    data_settings: dict[str, Any],
    num_ranks: int,
    callbacks: list[Callback],
    loggers: Any = False,
    module_class: type[SFTModule] = SFTModule,
) -> tuple[L.Trainer, SFTModule, SFTDataModule]:
    """Of a run with these settings on the token store in `folder`; no schedule, nothing saved, nothing validated."""
    quiet()
    fixed = ["logger=csv", "schedule=constant", "schedule.warmup=0", f"trainer.devices={num_ranks}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", [*fixed, *overrides])
    data = SFTDataModule(Store(folder / "store", [Source("generated")]), None, **data_settings)
    module = module_class(
        model_source(config),
        instantiate(config.optimizer, _convert_="all"),
        instantiate(config.schedule),
        data.num_steps,
        data.seed,
    )
    trainer = instantiate(
        config.trainer,
        strategy=build(config.strategy, config.trainer.accelerator),
        logger=loggers,
        callbacks=callbacks,
        accumulate_grad_batches=data.accumulation(num_ranks),
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    return trainer, module, data
