"""What the ranks of a benchmark work on: a small Llama and a token store, on disk."""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from benchmarks import generated
from benchmarks.prepare import write_model


def main(folder: Path, rank: int, num_ranks: int, options: dict[str, Any]) -> dict[str, int]:
    """Numbers of weights: of the whole model, of its largest tensor, and of the largest of layers and embeddings."""
    write_model(folder / "model", options)
    # Samples as long as a pack, one a micro-batch: all steps are alike.
    num_samples = options["steps"] * options["global_batch"]
    tokens = np.full(num_samples, options["max_length"], dtype=np.int32)
    rng = np.random.default_rng(options["seed"])
    generated.write_store(folder / "store", tokens, tokens // 2, options["vocab"], rng)
    with safe_open(folder / "model/model.safetensors", "np") as file:
        sizes = {name: int(np.prod(file.get_slice(name).get_shape())) for name in file.offset_keys()}
    largest = max(sizes.values())
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    return {"weights": sum(sizes.values()), "largest_tensor": largest, "largest_layer": max(layer, largest)}
