"""Is the machine used well? Seconds of each step, the wait for its batches, memory, and useful operations (MFU)."""

import resource
import sys
import time
from pathlib import Path

import lightning as L
import numpy as np
import torch

from sft.data.step_plan import Step
from sft.model.flops import Flops, of_model, peak
from sft.training.datamodule import SFTDataModule
from sft.training.log import log
from sft.training.module import SFTModule

GIB = 2**30


class Speed:
    """Times a step after another. Nothing here makes the host wait for the device."""

    def __init__(self) -> None:
        self.began = self.waited = 0.0
        self.flops: Flops | None = None  # where the device's peak is known
        self.peak = 0.0  # of all ranks' devices, FLOP/s

    def begin_fit(self, trainer: L.Trainer, module: SFTModule) -> None:
        if rate := device_peak(module.device, str(trainer.precision)):
            try:
                self.flops, self.peak = of_model(module.model), rate * trainer.world_size
            except Exception as error:  # of a model unlike others: a figure ends no run
                log(f"no train/mfu: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        self.waited = trainer.datamodule.seconds_waited  # type: ignore[attr-defined]

    def begin_step(self, data: SFTDataModule) -> None:
        """Called when the first micro-batch is there: the step began when it was asked for."""
        self.began = time.perf_counter() - (data.seconds_waited - self.waited)

    def largest(self, trainer: L.Trainer, module: SFTModule) -> torch.Tensor:
        """[2], of the rank that has most: peak of the memory in GiB, seconds that it waited for the step's batches.
        Called once the last batch is there, before the device is waited for."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        values = memory_peak(module.device) / GIB, data.seconds_waited - self.waited
        self.waited = data.seconds_waited
        if trainer.world_size == 1:
            return torch.tensor(values)
        # Filled in on the device: a copy would wait for it.
        mine = torch.stack([torch.full((), value, device=module.device) for value in values])
        return trainer.strategy.reduce(mine, reduce_op="max")

    def measure(self, plan: Step, data: SFTDataModule, largest: torch.Tensor) -> dict[str, float]:
        """Called after the step's values were read, so that work still queued on a device counts."""
        seconds = time.perf_counter() - self.began
        memory, waited = largest.tolist()
        metrics = {
            "train/tokens_per_second": plan.num_tokens / seconds,
            "train/seconds": seconds,
            "train/data_wait": min(1.0, waited / seconds),
            "train/memory_peak": memory,
        }
        if self.flops:
            lengths = data.train.lengths[np.concatenate(plan.packs)].astype(np.int64)
            needed = self.flops.of(plan.num_tokens, plan.num_supervised, int((lengths**2).sum()))
            metrics["train/mfu"] = needed / seconds / self.peak
        return metrics


def device_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of a rank's device in the arithmetic that a precision means; None where that isn't known."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    number_format = "bf16" if precision.startswith("bf16") else "tf32" if tf32 else "fp32"
    return peak(torch.cuda.get_device_name(device), number_format)


def memory_peak(device: torch.device) -> int:
    """Bytes: the most that tensors have taken on this rank's GPU or, without one, this process of the host's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # Linux, where the other one has a parent's own peak in it
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) * 1024
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
