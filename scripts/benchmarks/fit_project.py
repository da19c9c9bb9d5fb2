"""One run of this project as `sft train` makes it: `python -m benchmarks.fit_project FOLDER VARIANT OUT`."""

import json
import sys
import time
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from benchmarks.conditions import peak_rss, rss
from benchmarks.fit import parts
from benchmarks.shapes import fields
from sft.training.metrics import StepMetrics
from sft.training.metrics_file import MetricsFile

OBSERVED = 2  # the step, counted from 0, in which the device is asked what makes the host wait


class Clock(Callback):
    """When each optimizer step ended: from one end to the next nothing is left out, loading and logging neither."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []  # seconds on the wall, seconds of all cores
        self.graphs: list[int] = []  # that torch.compile had made by then

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.ends.append((time.perf_counter(), time.process_time()))
            self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


class Waits(Callback):
    """Where in one optimizer step the host waits for CUDA, as torch's debug mode for it tells."""

    def __init__(self) -> None:
        self.places: list[str] | None = None
        self.stack = ExitStack()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available() and batch_idx == OBSERVED * trainer.accumulate_grad_batches:
            self.seen = self.stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            self.stack.callback(torch.cuda.set_sync_debug_mode, "default")

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if torch.cuda.is_available() and batch_idx + 1 == (OBSERVED + 1) * trainer.accumulate_grad_batches:
            self.stack.close()
            told = [each for each in self.seen if "synchronizing CUDA operation" in str(each.message)]
            self.places = [f"{'/'.join(Path(each.filename).parts[-2:])}:{each.lineno}" for each in told]


def main(folder: Path, variant: str, out: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    setting = json.loads((folder / "plan.json").read_text())[variant]["data"]
    torch.set_num_threads(options["threads"])
    before, _ = rss()
    started = time.perf_counter()
    clock, waits, metrics = Clock(), Waits(), MetricsFile(out.with_suffix(".csv"))
    callbacks = [StepMetrics(), waits, clock]
    trainer, module, data = parts(folder, overrides(folder, options), setting, 1, callbacks, [metrics])
    trainer.fit(module, data)
    result = {
        "started": started,
        "ends": clock.ends,
        "graphs": clock.graphs,
        "losses": [float(row["train/loss"]) for row in metrics.metrics.rows],
        "rss_before": before,
        "rss_peak": peak_rss(),
        "num_parameters": sum(each.numel() for each in module.model.parameters()),
    }
    if options["gpu"]:
        result |= {"cuda_peak": torch.cuda.max_memory_allocated(), "waits": waits.places}
    out.write_text(json.dumps(result))


def overrides(folder: Path, options: dict[str, Any]) -> list[str]:
    """The settings of `sft train` that both contestants share, in its words."""
    model = ["model.path=" + str(folder / "model")]
    if not options["weights"]:  # none are on disk: they are drawn from the seed
        shape = [f"++model.config.{name}={json.dumps(value)}" for name, value in fields(options).items()]
        model = ["model=scratch", f"model.tokenizer={folder / 'model'}", *shape]
    return [
        *model,
        f"model.gradient_checkpointing={json.dumps(options['checkpointing'])}",
        "trainer=gpu" if options["gpu"] else "trainer=cpu",
        f"optimizer.lr={options['lr']}",
        "optimizer.weight_decay=0",
        *(["adapter=lora", f"adapter.r={options['lora']}"] if options["lora"] else []),
        *([f"trainer.precision={options['precision']}"] if options["precision"] else []),
        *options["overrides"],
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
