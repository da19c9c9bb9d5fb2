"""One rank's part of `bench checkpoint`: a model is loaded, trained a step, saved and restored, by this project and in
the stock way."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from benchmarks.fit_rank import parts
from benchmarks.ranks import Peak
from sft.checkpoint.checkpoint import latest
from sft.checkpoint.save import save
from sft.runs.files import fsync
from sft.training.checkpointing import layout
from sft.training.module import SFTModule


def main(
    folder: Path, rank: int, num_ranks: int, strategy: str, way: str, options: dict[str, Any]
) -> dict[str, list[dict[str, float]]]:
    """Seconds and bytes of each thing done, once a round; `way` is project or stock, which only loads."""
    results: dict[str, list[dict[str, float]]] = {}
    saving = [SaveAndRestore(folder, options["repeats"], results)] if way == "project" else []
    trainer, module, data = parts(
        folder, num_ranks, strategy, options, saving, {"project": Project, "stock": Stock}[way]
    )
    module.results = results
    try:
        trainer.fit(module, data)
    except Loaded:
        dist.barrier()
    return results


def measured(action: Callable[[], Any]) -> dict[str, float]:
    dist.barrier()
    start = time.perf_counter()
    with Peak() as peak:
        action()
        dist.barrier()
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "resident": peak.resident, "private": peak.private}


class Loaded(Exception):
    """All that was to be measured is measured."""


class Project(SFTModule):
    """Measures how this project loads a model."""

    results: dict[str, list[dict[str, float]]]

    def configure_model(self) -> None:
        if not hasattr(self, "model"):
            self.results["load"] = [measured(self.load)]

    def load(self) -> None:
        super().configure_model()


class Stock(Project):
    """Measures `from_pretrained` as transformers does it under ZeRO-3, or followed by `fully_shard`."""

    def configure_model(self) -> None:
        super().configure_model()
        raise Loaded

    def load(self) -> None:
        strategy: Any = self.trainer.strategy
        config = getattr(strategy, "config", None)
        alive = HfDeepSpeedConfig(config) if config else None  # from_pretrained looks whether there is one
        self.model = AutoModelForCausalLM.from_pretrained(self.source.path, dtype=torch.float32)
        del alive
        if config:
            return
        from torch.distributed.fsdp import fully_shard

        mesh = strategy.device_mesh["data_parallel"]
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class SaveAndRestore(Callback):
    """After the last step saves and restores, by this project and under DeepSpeed by its engine, in turn."""

    def __init__(self, folder: Path, repeats: int, results: dict[str, list[dict[str, float]]]) -> None:
        self.folder, self.repeats, self.results = folder / "checkpoints", repeats, results

    def on_train_end(self, trainer: Any, module: Any) -> None:
        engine = getattr(trainer.strategy, "deepspeed_engine", None)
        where = layout(trainer, module)
        state = {"num_steps": 1, "stopped": False, "val_loss": None}
        for _ in range(self.repeats):
            self.note("save", partial(save, self.folder, 1, where, {}, state, {}))
            checkpoint = latest(self.folder)
            assert checkpoint is not None
            self.note("verify", checkpoint.verify)
            self.note("restore", partial(checkpoint.restore, where))
            self.clear()
            if engine is not None:
                self.note("engine save", partial(engine.save_checkpoint, str(self.folder)))
                self.note("engine flush", self.flush)
                self.note("engine restore", partial(engine.load_checkpoint, str(self.folder)))
                self.clear()

    def note(self, name: str, action: Callable[[], Any]) -> None:
        size = {"files": sum(path.stat().st_size for path in self.files())}
        self.results.setdefault(name, []).append(measured(action) | size)

    def files(self) -> list[Path]:
        return [path for path in sorted(self.folder.rglob("*")) if path.is_file()]

    def flush(self) -> None:
        """What the engine leaves to the system: that the files are on the disk. Each rank waits for some of them."""
        for path in self.files()[dist.get_rank() :: dist.get_world_size()]:
            fsync(path)

    def clear(self) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.folder)
            os.sync()  # so that the next one has the disk to itself
        dist.barrier()
