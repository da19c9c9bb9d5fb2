"""What each validation measures besides the loss, over all ranks: `docs/metrics.md` has the formulas."""

from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from sft.data.store import Store
from sft.evaluation import base as base_file
from sft.evaluation.base import Base, FixedTokens, gain
from sft.evaluation.responses import Responses, columns, stop_trouble
from sft.evaluation.validation_pass import ValidationPass
from sft.model.loss import nll
from sft.ranks import together
from sft.runs import watchdog
from sft.training.log import log
from sft.training.module import SFTModule

ROWS_AT_ONCE = 16  # of the vocabulary's size, that ranks add up


class Validation(Callback):
    """Measures at each validation, and keeps what the model before training says for later ones.

    It comes before callbacks that validate other weights with the same module.

    Args:
        folder: of the run, where the base model's part is kept.
        stop_ids: the tokens that end responses.
        num_fixed: fixed tokens at which the model is compared with that before training.
    """

    def __init__(self, folder: Path, stop_ids: Sequence[int], num_fixed: int) -> None:
        self.folder, self.stop_ids, self.num_fixed = folder, stop_ids, num_fixed
        self.responses: Responses | None = None
        self.base: Base | None = None
        self.lost = False  # the base model's part isn't there
        self.warned = False  # of stop tokens, and it hasn't got better since

    def on_validation_epoch_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.responses is None:
            self.responses = Responses.of(data.val, self.stop_ids)
        if trainer.sanity_checking:
            self.base = None
            data.fixed = FixedTokens.spread(data.val.lengths, self.num_fixed) if self.num_fixed else None
        else:
            self._read(len(data.val))
            data.fixed = self.base.fixed if self.base and self.num_fixed else None
        module.measures = ValidationPass(data.val, self.responses, self.stop_ids, data.fixed, self.base)

    def _read(self, num_samples: int) -> None:
        if self.base is not None or self.lost:
            return
        base = Base.read(self.folder, num_samples)
        self.lost = not all(together(lambda: base is not None))
        if self.lost:
            log(f"{self.folder / base_file.NAME} can't be read: nothing is compared with the model before training")
        else:
            self.base = base

    def on_validation_epoch_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        data, responses, done = trainer.datamodule, self.responses, module.measures  # type: ignore[attr-defined]
        module.measures = None
        assert responses is not None and done is not None
        done.end()
        sums = _sum(trainer, done.sums)
        metrics = columns(responses, sums, _sources(data.val))
        of_samples = responses.by_sample(sums[:, 0])
        if trainer.sanity_checking:
            self._write(trainer, done, of_samples)
        if metrics and (trainer.sanity_checking or self.base is not None):  # there are tokens that weigh something
            before = self.base.nll if self.base is not None else of_samples
            metrics["val/gain"], error = gain(before, of_samples, responses.by_sample(responses.weight))
            metrics |= {} if error is None else {"val/gain_error": error}
            if data.fixed is not None:
                metrics["val/base_tokens_loss"], metrics["val/kl_base"] = _sum(trainer, done.of_fixed).mean(0).tolist()
        if data.text is not None:
            metrics["val/general_loss"] = _general_loss(trainer, module)
        module.val_metrics = metrics
        module.log_dict(metrics, logger=False, sync_dist=True)
        self._warn(trainer.global_step, module.num_steps, stop_trouble(metrics))

    def _warn(self, step: int, num_steps: int, trouble: str | None) -> None:
        """Once in the second half of the run, by which a model has learned to stop, and after the last step."""
        due = step >= num_steps / 2 and (not self.warned or step == num_steps)
        if trouble and due:
            log(f"step {step}: {trouble}")
        self.warned = bool(trouble) and (self.warned or due)

    def _write(self, trainer: L.Trainer, done: ValidationPass, of_samples: NDArray[np.float64]) -> None:
        log_probs = _whole(trainer, done)
        if not trainer.is_global_zero:
            return
        try:
            base_file.write(self.folder, of_samples, done.fixed, log_probs)
        except (OSError, SafetensorError) as error:
            log(f"{self.folder / base_file.NAME} can't be written ({error}): no model is compared with it")


def _sources(val: object) -> dict[str, NDArray[np.bool_]]:
    """Which of the samples each source has."""
    if not isinstance(val, Store):
        return {}
    return {name: val.source_numbers == number for number, name in enumerate(val.source_names)}


def _sum(trainer: L.Trainer, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over all ranks."""
    total = trainer.strategy.reduce(torch.from_numpy(values).to(trainer.strategy.root_device), reduce_op="sum")
    assert isinstance(total, Tensor)
    return total.cpu().numpy()


def _whole(trainer: L.Trainer, done: ValidationPass) -> NDArray[np.float32] | None:
    """The base model's log-probabilities of all ranks' fixed tokens, on the first rank, float32 [M, V]."""
    if done.fixed is None:
        return None
    num, mine = len(done.fixed.sample), done.log_probs
    num_vocab = max(together(lambda: max(map(len, mine.values()), default=0)))
    whole = np.zeros((num if trainer.is_global_zero else 0, num_vocab), np.float32)
    for start in range(0, num, ROWS_AT_ONCE):
        rows = torch.zeros(min(ROWS_AT_ONCE, num - start), num_vocab)
        for number in mine.keys() & set(range(start, start + len(rows))):
            rows[number - start] = torch.from_numpy(mine[number])
        total = trainer.strategy.reduce(rows.to(trainer.strategy.root_device), reduce_op="sum")
        assert isinstance(total, Tensor)
        if trainer.is_global_zero:
            whole[start : start + len(rows)] = total.cpu().numpy()
    return whole if trainer.is_global_zero else None


def _general_loss(trainer: L.Trainer, module: SFTModule) -> float:
    """Σ (−log p) over all tokens of the text but its samples' first / their number."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    sums = torch.zeros(2, dtype=torch.float64, device=module.device)
    for batch in data.text_dataloader():
        watchdog.beat()
        on_device = data.transfer_batch_to_device(batch, module.device, 0)
        with trainer.precision_plugin.val_step_context():
            for part in module.isolation.parts(on_device):
                sums[0] += nll(module.model, part, plain_head=module.plain_head)
        sums[1] += len(batch["predicting"])
    total, num = trainer.strategy.reduce(sums, reduce_op="sum").tolist()
    return total / num
