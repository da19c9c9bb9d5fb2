"""How the samples of a micro-batch are kept from one another: packed in one row, or apart, a forward pass for each.

Which of the two a model can do, and by which attention, is found by `first_batch`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

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
        found = provenance.recorded(run).get("first_batch")
        return cls(found["attention"], found["apart"]) if found else cls()

    def __str__(self) -> str:
        """As one says it of samples."""
        return f"{'one at a time' if self.apart else 'packed'} by {self.attention} attention"

    def parts(self, batch: Batch) -> list[Batch]:
        """The batches that the model is called with for this one: itself, or one for each of its samples."""
        return one_by_one(batch) if self.apart else [batch]


def one_by_one(batch: Batch) -> list[Batch]:
    """A batch for each sample; then empty ones, up to `num_parts`, so that all ranks make equally many passes."""
    bounds, predicting = batch["cu_seqlens"].tolist(), batch["predicting"]
    parts = []
    for number, (start, end) in enumerate(pairwise(bounds)):
        of_sample = (predicting >= start) & (predicting < end)
        part = {**batch, **{name: batch[name][:, start:end] for name in ("input_ids", "labels", "position_ids")}}
        part["predicting"] = predicting[of_sample] - start
        part["weights"] = None if batch["weights"] is None else batch["weights"][of_sample]
        part["cu_seqlens"] = batch["cu_seqlens"][number : number + 2] - start
        part["max_seqlen"] = part["num_tokens"] = end - start
        if "keys" in batch:
            part["keys"] = batch["keys"][start:end]
        if "samples" in batch:
            part["samples"] = batch["samples"][number : number + 1]
        if "fixed" in batch:
            fixed = batch["fixed"]
            part["fixed"] = fixed[(fixed >= start) & (fixed < end)] - start
        parts.append(cast(Batch, part))
    return parts


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
