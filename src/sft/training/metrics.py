"""Metrics of each optimizer step, and the file that holds each step exactly once."""

import csv
import io
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

from sft.cluster.time_limit import clock
from sft.data.batch import Batch
from sft.errors import NotFinite
from sft.model.loss import Objective
from sft.runs.files import fsync, write_text
from sft.runs.metrics_file import Metrics
from sft.training.log import log
from sft.training.module import SFTModule

# Metrics that depend on the machine and so differ between two runs of the same numbers.
TIMINGS = ("train/tokens_per_second",)
PRINT_EVERY = 5.0  # seconds between two printed lines; the first and the last step always print

COLUMNS = (
    "step",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/grad_norm_clipped",
    "train/supervised_share",
    "train/pack_fill",
    *TIMINGS,
    "val/loss",
    "val/perplexity",
)


class MetricsFile(Logger):
    """`metrics.csv`: a row a step, in order, none twice and none missing however often the run was killed.

    A validation's columns go into the row of the step that it followed. Row 0 is before training. A resumed run
    first drops the rows after its checkpoint, since it makes those steps again.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.metrics = Metrics(list(COLUMNS), [])

    name = "metrics"
    version = 0

    @rank_zero_only
    def resume(self, step: int) -> None:
        """Keeps the rows up to `step`; with step 0 none, since a fresh start measures again."""
        stored = Metrics.read(self.path)
        self.metrics.columns = stored.columns or self.metrics.columns
        self.metrics.rows = [row for row in stored.rows if 0 < step >= int(row["step"])]
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        step = int(step or 0)
        values = {name: repr(float(value)) for name, value in metrics.items() if name != "epoch"}
        columns, rows = self.metrics.columns, self.metrics.rows
        new = [name for name in values if name not in columns]
        columns += new
        if rows and rows[-1]["step"] == str(step):
            rows[-1] |= values
            self._rewrite()
        else:
            rows.append({"step": str(step)} | values)
            if new or len(rows) == 1:
                self._rewrite()
            else:
                with self.path.open("a", newline="") as file:
                    file.write(self._text(rows[-1:], header=False))

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """The configuration is in `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Waits until the rows are on the disk: a checkpoint must not outlive the rows up to its step."""
        if self.path.exists():
            fsync(self.path)

    def _text(self, rows: list[dict[str, str]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.metrics.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, self._text(self.metrics.rows, header=True))


class StepMetrics(Callback):
    """Measures each optimizer step, gives it to the loggers, and shows it: in a line now and then, or in a progress
    bar on the first rank."""

    def __init__(self, progress_bar: bool = False) -> None:
        self.progress_bar = progress_bar
        self.bar: tqdm[NoReturn] | None = None
        self.last_print, self.step_start, self.fit_start = -math.inf, 0.0, 0.0
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        self.fit_start = time.perf_counter()
        self.first_step = trainer.global_step
        if self.progress_bar and trainer.is_global_zero:
            self.bar = tqdm(
                total=module.num_steps, initial=self.first_step, unit=" steps", dynamic_ncols=True, file=sys.stdout
            )

    def on_train_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: SFTModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module: SFTModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.step_start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: SFTModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        plan = data.step(step - 1)
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in module.step_sums.items()}
        nll = sums["nll"]
        loss, *added = (value / plan.weight for value in (nll.tolist() if nll.ndim else [float(nll)]))
        norm, clipped = float(module.grad_norm), module.norm_of_clipped
        largest = float(trainer.gradient_clip_val or math.inf)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(
                f"step {step}: the loss is {loss}, the gradient's norm {norm}, so nothing of this step is saved. Set a "
                "lower optimizer.lr or a longer warm-up, or look at the step's samples"
            )
        metrics = {
            "train/loss": loss,
            **_added(module.objective, added, sums, plan.num_tokens),
            "train/lr": module.learning_rate,
            "train/grad_norm": norm,
            "train/grad_norm_clipped": min(norm, largest) if clipped is None else float(clipped),
            "train/supervised_share": plan.num_supervised / plan.num_tokens,
            "train/pack_fill": plan.num_tokens / (len(plan.packs) * data.pack_length),
        }
        # After the values were read, so that work still queued on a device counts.
        seconds = time.perf_counter() - self.step_start
        metrics["train/tokens_per_second"] = plan.num_tokens / seconds
        self._log(trainer, metrics, step)
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {metrics['train/tokens_per_second']:,.0f} tokens/s", False)
            self.bar.update()
        elif now - self.last_print > PRINT_EVERY or step in (1, module.num_steps):
            self.last_print = now
            left = (now - self.fit_start) / (step - self.first_step) * (module.num_steps - step)
            log(
                f"step {step:>{len(str(module.num_steps))}}/{module.num_steps}  loss {metrics['train/loss']:.4f}"
                f"  lr {metrics['train/lr']:.2e}  |grad| {metrics['train/grad_norm']:.2f}"
                f"  {metrics['train/tokens_per_second']:,.0f} tokens/s  {clock(left)} left"
            )

    def on_validation_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        loss = module.val_loss
        perplexity = math.exp(loss) if loss < 700 else math.inf
        metrics = {**module.val_losses, "val/perplexity": perplexity, **module.val_metrics}
        self._log(trainer, metrics, trainer.global_step)
        named = {name.removeprefix("val/loss/"): of_set for name, of_set in module.val_losses.items()}
        sets = "".join(f"; {name} {of_set:.4f}" for name, of_set in named.items() if name != "val/loss")
        log(f"step {trainer.global_step}: validation loss {loss:.4f}, perplexity {perplexity:,.2f}{sets}")

    def _log(self, trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)


def _added(objective: Objective, to_nll: list[float], sums: Mapping[str, Tensor], num_tokens: int) -> dict[str, float]:
    """What a step's objective adds to its mean −log p, by column, and the largest share of a layer's tokens that an
    expert has, over that of even shares. `to_nll`: the means of label smoothing and z-loss, where there are any."""
    columns = dict(zip(("train/label_smoothing", "train/z_loss"), to_nll, strict=False))
    if "router_aux" in sums:
        load_LE = sums["expert_load"]
        columns["train/router_aux"] = objective.router_aux * float(sums["router_aux"]) / num_tokens
        columns["train/expert_load_max"] = float((load_LE / load_LE.mean(1, keepdim=True)).max())
    return {name: value for name, value in columns.items() if getattr(objective, name.removeprefix("train/"), 1.0)}
