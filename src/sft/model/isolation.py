"""How the samples of a micro-batch are kept from one another: packed in one row, or apart, a forward pass for each.

Which of the two a model can do, and by which attention, is found by `first_batch`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from sft.data.batch import Batch
from sft.model.attention import NAME as PACKED
from sft.runs import provenance


@dataclass(frozen=True)
class Isolation:
    """How a model's samples are kept from one another."""

    attention: str = PACKED  # as transformers knows it
    apart: bool = False  # a forward pass for each sample

    @classmethod
    def recorded(cls, run: Path) -> "Isolation":
        """As the run in this folder has proven it; packed for runs begun before there was a proof."""
        found = provenance.first_batch(run)
        return cls(found["attention"], found["apart"]) if found else cls()

    def __str__(self) -> str:
        """As one says it of samples."""
        return f"{'one at a time' if self.apart else 'packed'} by {self.attention} attention"

    def parts(self, batch: Batch) -> list[Batch]:
        """The batches that the model is called with for this one: itself, or one for each of its samples."""
        return one_by_one(batch) if self.apart else [batch]


def one_by_one(batch: Batch) -> list[Batch]:
    """A batch for each sample; then empty ones, up to `num_parts`, so that all ranks make equally many passes.

    Where the tensors are on CUDA, the host doesn't wait for them.
    """
    parts, start = [], np.zeros(3, dtype=np.int64)
    for number, count in enumerate(batch["counts"]):
        spans = [slice(begin, end) for begin, end in zip(start.tolist(), (start + count).tolist(), strict=True)]
        parts.append(_part(batch, slice(number, number + 1), *spans))
        start += count
    for _ in range(batch.get("num_parts", 0) - len(parts)):
        # One token without loss, as in `make_batch`: the first of a sample is never supervised.
        empty = _part(batch, slice(0, 1), slice(0, 1), slice(0, 0), slice(0, 0))
        empty["num_tokens"], empty["counts"] = 0, np.array([[1, 0, 0]])
        if "samples" in batch:
            empty["samples"] = batch["samples"][:0]
        parts.append(empty)
    return parts


def _part(batch: Batch, sample: slice, tokens: slice, predicting: slice, fixed: slice) -> Batch:
    """One sample of a batch, or the first tokens of one."""
    start, length, weights = tokens.start, tokens.stop - tokens.start, batch["weights"]
    part: Batch = {
        "input_ids": batch["input_ids"][:, tokens],
        "labels": batch["labels"][:, tokens],
        "position_ids": batch["position_ids"][:, tokens],
        "predicting": batch["predicting"][predicting] - start,
        "weights": None if weights is None else weights[predicting],
        "cu_seqlens": torch.arange(2, dtype=torch.int32, device=batch["cu_seqlens"].device) * length,
        "max_seqlen": length,
        "step_weight": batch["step_weight"],
        "num_tokens": min(length, batch["num_tokens"]),
        "counts": batch["counts"][sample],
    }
    if "keys" in batch:
        part["keys"] = batch["keys"][tokens]
    if "seeds" in batch:
        part["seeds"] = batch["seeds"][sample]
    if "samples" in batch:
        part["samples"] = batch["samples"][sample]
    if "fixed" in batch:
        part["fixed"] = batch["fixed"][fixed] - start
    return part


def configs(model: PreTrainedModel) -> list[PretrainedConfig]:
    """Of the model and its parts."""
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in found if isinstance(config, PretrainedConfig)}.values())


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Has all parts of a model compute their attention by an implementation that transformers knows by this name."""
    for config in configs(model):
        config._attn_implementation = name


def own_attention(model: PreTrainedModel) -> str:
    """The implementation that transformers gives the model by default."""
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return "sdpa" if all(part._supports_sdpa for part in parts) else "eager"


@contextmanager
def attending(model: PreTrainedModel, name: str) -> Iterator[None]:
    """While it lasts the model computes its attention by this implementation."""
    before = [(config, config._attn_implementation) for config in configs(model)]
    use_attention(model, name)
    try:
        yield
    finally:
        for config, kind in before:
            config._attn_implementation = kind
