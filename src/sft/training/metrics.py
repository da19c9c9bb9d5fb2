"""What is measured of each optimizer step and each validation, for the loggers and the terminal."""

import math
import re
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

import lightning as L
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer
from tqdm import tqdm

from sft.cluster.time_limit import clock
from sft.data.batch import Batch
from sft.errors import NotFinite
from sft.model import parameters
from sft.model.loss import Objective
from sft.training.layers import Layers
from sft.training.log import log
from sft.training.module import SFTModule
from sft.training.speed import Speed

PRINT_EVERY = 5.0  # seconds between two printed lines; the first and the last step always print


class StepMetrics(Callback):
    """Measures each optimizer step, gives it to the loggers, and shows it: in a line now and then, or in a progress
    bar on the first rank."""

    def __init__(self, progress_bar: bool = False, evaluation: Mapping[str, int] | None = None) -> None:
        self.progress_bar = progress_bar
        self.bar: tqdm[NoReturn] | None = None
        self.last_print, self.fit_start = -math.inf, 0.0
        self.first_step = 0
        self.speed, self.layers = Speed(), Layers((evaluation or {}).get("layers_every", 0))
        self.is_last_micro_batch = False
        self.groups: dict[str, int] = {}  # places of the optimizer's groups whose learning rates are shown, by column
        self.rates: dict[str, float] = {}  # of the step under way
        self.num_counted = self.num_clipped = 0  # steps of the run, whatever processes made them

    def on_train_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        self.fit_start = time.perf_counter()
        self.first_step = trainer.global_step
        self.groups = _rate_columns(trainer, module)
        self.speed.begin_fit(trainer, module)
        self.layers.begin_fit(module)
        if self.progress_bar and trainer.is_global_zero:
            self.bar = tqdm(
                total=module.num_steps, initial=self.first_step, unit=" steps", dynamic_ncols=True, file=sys.stdout
            )

    def state_dict(self) -> dict[str, int]:
        return {"num_counted": self.num_counted, "num_clipped": self.num_clipped}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_counted, self.num_clipped = state["num_counted"], state["num_clipped"]

    def on_train_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: L.Trainer, module: SFTModule, exception: BaseException) -> None:
        self.on_train_end(trainer, module)

    def on_train_batch_start(self, trainer: L.Trainer, module: SFTModule, batch: Batch, batch_idx: int) -> None:
        self.is_last_micro_batch = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.speed.begin_step(trainer.datamodule)  # type: ignore[attr-defined]
            groups = trainer.optimizers[0].param_groups
            self.rates = {column: groups[place]["lr"] for column, place in self.groups.items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, module: SFTModule, optimizer: Optimizer) -> None:
        if self.is_last_micro_batch:  # DeepSpeed is called for each
            self.layers.before_update(trainer, module)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: SFTModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step, data = trainer.global_step, trainer.datamodule  # type: ignore[attr-defined]
        plan = data.step(step - 1)
        sums = {name: trainer.strategy.reduce(value, reduce_op="sum") for name, value in module.step_sums.items()}
        largest = self.speed.largest(trainer, module)
        layers = self.layers.after_update(trainer, module)
        nll = sums["nll"]
        loss, *added = (value / plan.weight for value in (nll.tolist() if nll.ndim else [float(nll)]))
        norm, limit = float(module.grad_norm), float(trainer.gradient_clip_val or math.inf)
        after, largest_value = min(norm, limit), norm
        if module.clipped_values is not None:
            after, largest_value = module.clipped_values.tolist()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NotFinite(
                f"step {step}: the loss is {loss}, the gradient's norm {norm}, so nothing of this step is saved. Set a "
                "lower optimizer.lr or a longer warm-up, or look at the step's samples"
            )
        clipped = largest_value > limit
        self.num_counted += 1
        self.num_clipped += clipped
        tokens, supervised = data.seen(step)
        metrics = {
            "train/loss": loss,
            **_added(module.objective, added, sums, plan.num_tokens),
            **self.rates,
            "train/grad_norm": norm,
            "train/grad_norm_clipped": after,
            "train/clipped": float(clipped),
            "train/clipped_share": self.num_clipped / self.num_counted,
            "train/supervised_share": plan.num_supervised / plan.num_tokens,
            "train/pack_fill": plan.num_tokens / (len(plan.packs) * data.pack_length),
            "train/tokens": tokens,
            "train/supervised_tokens": supervised,
            "train/epoch": tokens / data.tokens_per_epoch,
            **self.speed.measure(plan, data, largest),
            **layers,
        }
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


def _rate_columns(trainer: L.Trainer, module: SFTModule) -> dict[str, int]:
    """Places of the groups whose learning rates are columns: the first and, of `parameters.groups`, those of another.
    A column has letters, digits and ._- of the pattern: not every tracker takes others."""
    peaks = trainer.lr_scheduler_configs[0].scheduler.base_lrs
    columns = {"train/lr": 0}
    for pattern, place in parameters.rates(module.model, module.source.parameters).items():
        name = "train/lr/" + (re.sub(r"[^\w.-]+", "_", pattern).strip("_.") or "all")
        if peaks[place] != peaks[0]:
            columns[f"{name}-{place}" if name in columns else name] = place
    return columns


def _added(objective: Objective, to_nll: list[float], sums: Mapping[str, Tensor], num_tokens: int) -> dict[str, float]:
    """What a step's objective adds to its mean −log p, by column, and the largest share of a layer's tokens that an
    expert has, over that of even shares. `to_nll`: the means of label smoothing and z-loss, where there are any."""
    columns = dict(zip(("train/label_smoothing", "train/z_loss"), to_nll, strict=False))
    if "router_aux" in sums:
        load_LE = sums["expert_load"]
        columns["train/router_aux"] = objective.router_aux * float(sums["router_aux"]) / num_tokens
        columns["train/expert_load_max"] = float((load_LE / load_LE.mean(1, keepdim=True)).max())
    return {name: value for name, value in columns.items() if getattr(objective, name.removeprefix("train/"), 1.0)}
