"""Weights in a token store: of each token, and summed once, when it is built."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sft.data import store as store_module
from sft.data.labels import IGNORE
from sft.data.rows import Source
from sft.data.store import DTYPES, Store, sum_weights
from sft.runs import manifest

ARRAYS = {
    "input_ids": [11, 12, 2, 13, 10, 14, 16, 2, 5, 6],
    "supervised": [0, 1, 1, 0, 0, 1, 1, 1, 0, 1],
    "offsets": [0, 3, 8, 10],
    "lengths": [3, 5, 2],
    "num_supervised": [2, 3, 1],
    "rows": [0, 1, 2],
    "content": [7, 8, 9],
}
WEIGHTS = [0, 1, 1, 0, 0, 0.25, 0.25, 3, 0, 0.1]


def written(folder: Path, weights: list[float] | None) -> Store:
    for name, dtype in DTYPES.items():
        np.array(ARRAYS[name], dtype).tofile(folder / f"{name}.bin")
    if weights is not None:
        np.array(weights, np.float32).tofile(folder / "weights.bin")
    sum_weights(folder)
    counts = {"samples": 3, "tokens": 10}
    (folder / "meta.json").write_text(json.dumps({"data_fingerprint": "", "sources": [counts]}))
    manifest.write(folder, manifest.entries(folder, [path.name for path in folder.iterdir()]))
    return Store(folder, [Source("a.jsonl")])


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_weights_come_back_with_their_sums(at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "SAMPLES_AT_ONCE", at_once)
    store = written(tmp_path, WEIGHTS)
    assert [store.weights(i).tolist() for i in range(2)] == [[0, 1, 1], [0, 0, 0.25, 0.25, 3]]  # type: ignore
    assert store.weight_sums.tolist() == [2, 3.5, float(np.float32(0.1))]
    assert store[1][1].tolist() == [IGNORE, IGNORE, 14, 16, 2]
    assert store.num_supervised.tolist() == [2, 3, 1]
    part = store.subset(np.array([2, 1]))
    assert part.weight_sums.tolist() == [float(np.float32(0.1)), 3.5]
    weights = part.weights(1)
    assert weights is not None and weights.dtype == np.float32
    assert weights.tolist() == [0, 0, 0.25, 0.25, 3]


def test_without_weights_a_token_weighs_1(tmp_path: Path) -> None:
    store = written(tmp_path, None)
    assert store.weights(1) is None
    assert store.weight_sums.tolist() == [2, 3, 1]
    assert store.subset(np.array([1])).weight_sums.tolist() == [3]
    assert not list(tmp_path.glob("weight*"))


def test_sums_are_read_and_not_made_again(tmp_path: Path) -> None:
    written(tmp_path, WEIGHTS)
    np.array([5.0, 6.0, 7.0]).tofile(tmp_path / "weight_sums.bin")
    store = Store(tmp_path, [Source("a.jsonl")])
    assert store.weight_sums.tolist() == [5, 6, 7]
    assert isinstance(store.weight_sums.base, np.memmap)


def test_a_large_store_is_summed_in_little_memory(tmp_path: Path) -> None:
    """200 MB of weights (holes in a file)."""
    num_samples, length = 500_000, 100
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(4 * num_samples * length)
    (length * np.arange(num_samples + 1)).tofile(tmp_path / "offsets.bin")
    tracemalloc.start()
    sum_weights(tmp_path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "weight_sums.bin").stat().st_size == 8 * num_samples
    assert most < 20e6
