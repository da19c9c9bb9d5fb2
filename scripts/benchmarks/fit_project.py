"""One run of this project as `sft train` makes it: `python -m benchmarks.fit_project FOLDER VARIANT OUT`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback

from benchmarks.conditions import peak_rss, rss
from sft.data.dataset import Split
from sft.data.rows import Source
from sft.data.schedule import check_division
from sft.data.store import Store
from sft.mistakes import CONF
from sft.model.module import SFTModule
from sft.training.datamodule import SFTDataModule
from sft.training.metrics import MetricsFile, StepMetrics
from sft.training.setup import quiet


class Clock(Callback):
    """When each optimizer step ended: from one end to the next nothing is left out, loading and logging neither."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []  # seconds on the wall, seconds of all cores

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.ends.append((time.perf_counter(), time.process_time()))


def main(folder: Path, variant: str, out: Path) -> None:
    quiet()
    options = json.loads((folder / "options.json").read_text())
    setting = json.loads((folder / "plan.json").read_text())[variant]["data"]
    torch.set_num_threads(options["threads"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "train",
            [
                f"model.path={folder / 'model'}",
                f"model.gradient_checkpointing={options['checkpointing']}",
                "trainer=cpu",
                "logger=none",
                "schedule=constant",
                "schedule.warmup=0",
                f"optimizer.lr={options['lr']}",
                "optimizer.weight_decay=0",
                *options["overrides"],
            ],
        )
    before, _ = rss()
    data = SFTDataModule(Split(Store(folder / "store", [Source("generated")])), None, **setting)
    module = SFTModule(
        instantiate(config.model, _convert_="all"),
        instantiate(config.optimizer),
        instantiate(config.schedule),
        data.num_steps,
        setting["seed"],
    )
    clock, metrics = Clock(), MetricsFile(out.with_suffix(".csv"))
    trainer = instantiate(
        config.trainer,
        strategy=instantiate(config.strategy) or "auto",
        logger=[metrics],
        callbacks=[StepMetrics(), clock],
        accumulate_grad_batches=check_division(setting["global_batch_size"], 1, setting["micro_batch_size"]),
        max_epochs=1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    losses = [float(row["train/loss"]) for row in metrics.rows]
    result = {"ends": clock.ends, "losses": losses, "rss_before": before, "rss_peak": peak_rss()}
    out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
