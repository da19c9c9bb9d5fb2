"""One rank's run of `bench strategies`: some steps as `sft train` makes them, under any strategy.

Its imports are done before the ranks are forked (see `benchmarks.ranks`).
"""

import ctypes
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers.models.llama.modeling_llama  # noqa: F401  what a model's first use would import
from lightning.pytorch.callbacks import Callback

from benchmarks import fit
from benchmarks.ranks import Peak, bytes_sent
from sft.training.datamodule import SFTDataModule
from sft.training.metrics import StepMetrics
from sft.training.module import SFTModule

if not torch.cuda.is_available():
    import deepspeed  # noqa: F401  looks at CUDA, which a process that forks must not

M_MMAP_THRESHOLD = -3  # of malloc.h: blocks from this size on go back to the system when they are freed


class Steps(Callback):
    """When each optimizer step ended: seconds on the wall, seconds of the processor, bytes sent by then."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float, int]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.ends.append((time.perf_counter(), time.process_time(), bytes_sent()))


def main(
    folder: Path, rank: int, num_ranks: int, strategy: str, options: dict[str, Any], frugal: bool
) -> dict[str, Any]:
    """What `Steps` notes, and the peak of memory. It is what is in use where `frugal`, which takes time: otherwise
    glibc keeps most of what is freed in blocks below 32 MB."""
    steps = Steps()
    if frugal and sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
    cuda = torch.cuda.is_available()
    trainer, module, data = parts(folder, num_ranks, strategy, options, [StepMetrics(), steps])
    with Peak(every=0.01) as peak:
        trainer.fit(module, data)
    return {
        "ends": steps.ends,
        "num_tokens": [data.step(step).num_tokens for step in range(data.num_steps)],
        "cuda": cuda,
        "peak": torch.cuda.max_memory_allocated() if cuda else peak.private,
    }


def parts(
    folder: Path,
    num_ranks: int,
    strategy: str,
    options: dict[str, Any],
    callbacks: list[Callback],
    module_class: type[SFTModule] = SFTModule,
) -> tuple[L.Trainer, SFTModule, SFTDataModule]:
    """Trainer, module and data of a run on the model and the token store in `folder`, as `prepare_rank` made them."""
    trainer = "trainer=gpu" if torch.cuda.is_available() else "trainer=cpu"
    overrides = [f"model.path={folder / 'model'}", f"strategy={strategy}", trainer, *options["overrides"]]
    data = {
        "seed": options["seed"],
        "epochs": 1,
        "max_steps": options["steps"],
        "global_batch_size": options["global_batch"],
        "micro_batch_size": 1,
        "max_length": options["max_length"],
        "packing": False,
    }
    return fit.parts(folder, overrides, data, num_ranks, callbacks, module_class=module_class)
