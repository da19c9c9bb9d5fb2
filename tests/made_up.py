"""Made-up models and batches, for tests that compute with them."""

import weakref
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sft.checkpoint.layout import Whole, allocate
from sft.data.labels import IGNORE
from sft.data.rows import Source
from sft.data.store import Store, sum_weights

NUM_PROMPT = 2  # tokens without loss at the start of each of a pack's samples
# A small model of any family.
SIZE: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class OneRank:
    """Shards by giving this rank everything."""

    layout = Whole

    def shard(self, model: nn.Module) -> None:
        allocate(model, torch.device("cpu"))
        model.tie_weights()


def pack(lengths: list[int]) -> dict:
    """Random samples of these lengths in one row, the first NUM_PROMPT tokens of each without loss."""
    generator = torch.Generator().manual_seed(1)
    bounds = [0, *accumulate(lengths)]
    ids = torch.randint(0, 264, (1, bounds[-1]), generator=generator)
    labels = ids.clone()
    for start in bounds[:-1]:
        labels[0, start : start + NUM_PROMPT] = IGNORE
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "predicting": (labels[0, 1:] != IGNORE).nonzero()[:, 0],
        "weights": None,
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "max_seqlen": max(lengths),
        "step_weight": sum(length - NUM_PROMPT for length in lengths),
        "num_tokens": bounds[-1],
        "counts": np.array([[length, max(0, length - NUM_PROMPT), 0] for length in lengths]),
    }


def drawn(labels: list[int]) -> list[float]:
    """Weights of tokens' losses that differ within a sample and between samples, and whose mean isn't 1."""
    return [0.0 if label == IGNORE else 0.5 + (place + len(labels)) % 4 for place, label in enumerate(labels)]


def weigh(cache: Path) -> None:
    """Gives the tokens of the only token store in a cache such weights."""
    (folder,) = (path.parent for path in cache.glob("stores/*/meta.json"))
    store = Store(folder, [Source("any")])
    weights = np.concatenate([drawn(store[i][1].tolist()) for i in range(len(store))])
    weights.astype(np.float32).tofile(folder / "weights.bin")
    sum_weights(folder)


class Weights:
    """A model's weights, read as a checkpoint's are, counting the bytes of those that somebody still holds."""

    def __init__(self, model: Any) -> None:
        self.tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        self.layout = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in self.tensors.items()}
        self.held: dict[int, int] = {}
        self.most_held = 0

    def read(self, name: str) -> Tensor:
        tensor = self.tensors[name].clone()
        self.held[id(tensor)] = tensor.nbytes
        weakref.finalize(tensor, self.held.pop, id(tensor))
        self.most_held = max(self.most_held, sum(self.held.values()))
        return tensor
