"""One pass over the validation samples, as one rank sees it: what is measured at their tokens besides the loss."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from sft.data.batch import Batch, SampleSet
from sft.evaluation.base import Base, FixedTokens
from sft.evaluation.responses import NUM_SUMS, Responses
from sft.model.token_measures import measured_nll


class ValidationPass:
    """Sums of this rank's samples, 0 of the others': over the ranks they add up to those of all.

    Args:
        fixed: the tokens at which the model is compared with that before training; None: nowhere.
        base: the model before training; None: the model is that, and `log_probs` keeps what it says.
    """

    def __init__(
        self,
        samples: SampleSet,
        responses: Responses,
        stop_ids: Sequence[int],
        fixed: FixedTokens | None,
        base: Base | None,
    ) -> None:
        self.lengths, self.responses = samples.lengths, responses
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64)
        self.fixed, self.base = fixed, base
        self.sums = np.zeros((len(responses.length), NUM_SUMS))
        self.of_fixed = np.zeros((len(fixed.sample) if fixed else 0, 2))  # −log p, and KL(base ‖ now)
        self.log_probs: dict[int, NDArray[np.float32]] = {}  # of the base model, by number of the fixed token
        self._pending: tuple[Batch, Tensor, list[tuple[NDArray[np.int64], Tensor]]] | None = None

    def step(self, model: PreTrainedModel, batch: Batch, plain_head: bool) -> Tensor:
        """The batch's sum of weight · −log p, as `loss.nll`."""
        self.stop_ids = stop_ids = self.stop_ids.to(batch["input_ids"].device)
        at_fixed: list[tuple[NDArray[np.int64], Tensor]] = []
        if self.fixed is None:
            total, measured = measured_nll(model, batch, stop_ids, plain_head=plain_head)
        else:
            numbers = self.fixed.of_batch(batch["samples"], self.lengths)[0]
            target_M = batch["input_ids"][0, batch["fixed"] + 1]

            def keep(log_probs_RV: Tensor, first: int) -> None:
                rows = slice(first, first + len(log_probs_RV))
                of_rows, nll_R = numbers[rows], -log_probs_RV.gather(1, target_M[rows, None])[:, 0].double()
                at_fixed.append((of_rows, torch.stack([nll_R, self._kl(log_probs_RV, of_rows)], 1)))

            total, measured = measured_nll(model, batch, stop_ids, plain_head=plain_head, at_fixed=keep)
        # A batch is fetched when the next one is under way, so that the device never waits for the host.
        self._fetch()
        self._pending = batch, measured, at_fixed
        return total

    def _kl(self, now_RV: Tensor, numbers: NDArray[np.int64]) -> Tensor:
        """Σ_v p_v (log p_v − log q_v) of each row, p the base model's probabilities and q those of now; float64 [R]."""
        if self.base is None:
            self.log_probs |= dict(zip(numbers.tolist(), now_RV.cpu().numpy(), strict=True))
            return torch.zeros(len(now_RV), dtype=torch.float64, device=now_RV.device)
        base_RV = torch.stack([self.base.log_probs(number) for number in numbers.tolist()])
        on_cuda = now_RV.device.type == "cuda"
        pinned = base_RV.pin_memory() if on_cuda else base_RV  # or the copy waits for all that is queued
        base_RV = pinned.to(now_RV.device, non_blocking=on_cuda)
        terms = base_RV.exp() * (base_RV - now_RV)
        return terms.where(base_RV.isfinite(), 0.0).sum(-1, dtype=torch.float64)  # p log p is 0 where p is

    def _fetch(self) -> None:
        if self._pending is None:
            return
        (batch, measured, at_fixed), self._pending = self._pending, None
        weights = None if batch["weights"] is None else batch["weights"].cpu().numpy()
        self.responses.add(self.sums, batch["samples"], measured.cpu().numpy(), weights)
        for numbers, values in at_fixed:
            self.of_fixed[numbers] = values.cpu().numpy()

    def end(self) -> None:
        """After the last batch."""
        self._fetch()
