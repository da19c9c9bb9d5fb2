"""Samples on disk: made once, memory-mapped ever after.

    cache/stores/<key>/       key: sha256 of data, tokenizer, row function, settings and code
        input_ids.bin         int32 [num_tokens]       all samples end to end
        supervised.bin        uint8 [num_tokens]       1 where the token carries loss
        offsets.bin           int64 [num_samples + 1]  sample i is tokens offsets[i] to offsets[i + 1]
        lengths.bin           int32 [num_samples]
        num_supervised.bin    int32 [num_samples]
        rows.bin              int64 [num_samples]      the row of its source that a sample came from
        content.bin           uint64 [num_samples]     a hash of all samples of that row
        weights.bin           float32 [num_tokens]     of each token's loss, 0 where there is none
        weight_sums.bin       float64 [num_samples]    the sum of a sample's weights
        meta.json             the ledger
        manifest.json         size and checksum of each file

The weights are there only if a row brings some; without them every supervised token weighs 1.

`build` writes a store in a folder of its own and renames it once complete, so it is there whole or not at all; if
several processes build the same one, the first wins. No file locks: some cluster file systems ignore them.
"""

import json
from collections.abc import Sequence
from copy import copy
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.data.files import short_names
from sft.data.labels import IGNORE
from sft.data.ledger import Counts, SourceCounts
from sft.data.rows import Source
from sft.runs import manifest

DTYPES = {
    "input_ids": "int32",
    "supervised": "uint8",
    "offsets": "int64",
    "lengths": "int32",
    "num_supervised": "int32",
    "rows": "int64",
    "content": "uint64",
}
WEIGHT_DTYPES = {"weights": "float32", "weight_sums": "float64"}
REBUILD = "remove the folder {}: the same command builds it again from the data"
SAMPLES_AT_ONCE = 2**10  # whose weights are summed, in float64


class Store:
    """The samples of some sources, in row order. Opening it reads only meta.json.

    Damaged where the files' sizes aren't what was written."""

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        check(folder, contents=False)
        meta = json.loads((folder / "meta.json").read_text())
        self.fingerprint = folder.name
        self.data_fingerprint: str = meta["data_fingerprint"]
        counts: list[Counts] = meta["sources"]
        # Matched by order alone: the same content may be elsewhere next time.
        self.counts: list[SourceCounts] = [
            {"source": str(source), **of_source} for source, of_source in zip(sources, counts, strict=True)
        ]
        self.source_names = short_names(sources)
        self._source_ends = np.cumsum([of_source["tokens"] for of_source in counts])
        dtypes = DTYPES | WEIGHT_DTYPES if (folder / "weights.bin").exists() else DTYPES
        arrays = {
            name: np.asarray(np.memmap(folder / f"{name}.bin", dtype, mode="r")) for name, dtype in dtypes.items()
        }
        self.lengths: NDArray[np.int32] = arrays["lengths"]  # [num_samples], tokens
        self.num_supervised: NDArray[np.int32] = arrays["num_supervised"]  # [num_samples], tokens
        # [num_samples]: the sum of the weights of a sample's supervised tokens; their number where all weigh 1
        self.weight_sums: NDArray[np.float64] | NDArray[np.int32] = arrays.get("weight_sums", self.num_supervised)
        self.content: NDArray[np.uint64] = arrays["content"]  # [num_samples], equal for equal rows
        self._begins, self._rows = arrays["offsets"][:-1], arrays["rows"]  # both [num_samples]
        self._input_ids, self._supervised = arrays["input_ids"], arrays["supervised"]  # both [num_tokens]
        self._weights: NDArray[np.float32] | None = arrays.get("weights")  # [num_tokens]

    def subset(self, indices: NDArray[np.int64]) -> "Store":
        """The samples at these indices alone, in this order."""
        subset = copy(self)
        for name in ("lengths", "num_supervised", "weight_sums", "content", "_begins", "_rows"):
            setattr(subset, name, getattr(self, name)[indices])
        return subset

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """`(input_ids, labels)`, both [length]; labels are IGNORE where there is no loss."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self._begins[i], self._begins[i] + self.lengths[i]
        input_ids = self._input_ids[begin:end]
        return input_ids, np.where(self._supervised[begin:end], input_ids, np.int32(IGNORE))

    def weights(self, i: int) -> NDArray[np.float32] | None:
        """Of each token's loss, [length], 0 where there is none; None: every supervised token weighs 1."""
        return None if self._weights is None else self._weights[self._begins[i] : self._begins[i] + self.lengths[i]]

    @property
    def source_numbers(self) -> NDArray[np.int64]:
        """Of the source that each sample came from, [num_samples]."""
        return np.searchsorted(self._source_ends, self._begins, side="right")

    def source(self, i: int) -> str:
        """Name of the source that sample i came from."""
        number = int(np.searchsorted(self._source_ends, self._begins[i], side="right"))
        return self.counts[number]["source"]

    def row(self, i: int) -> int:
        """Number, counted from 0, of the row of its source that sample i came from."""
        return int(self._rows[i])


def check(folder: Path, contents: bool) -> None:
    """Damaged where a store's files aren't what was written: meta.json's checksum is compared, and of the others the
    sizes or, with `contents`, the checksums."""
    files = manifest.read(folder, REBUILD.format(folder))
    if files is None:  # no store is from before there were any: its name holds a hash of this code
        wrong = [f"{folder / manifest.NAME} is missing"]
    else:
        meta = {name: entry for name, entry in files.items() if name == "meta.json"}
        wrong = manifest.faults(folder, meta) or manifest.faults(folder, files, contents)
    if wrong:
        raise manifest.Damaged(wrong[0], REBUILD.format(folder))


def sum_weights(folder: Path) -> None:
    """Writes `weight_sums.bin` of a store that is being built, if it has `weights.bin`."""
    if not (folder / "weights.bin").exists():
        return
    weights = np.memmap(folder / "weights.bin", WEIGHT_DTYPES["weights"], mode="r")
    offsets = np.memmap(folder / "offsets.bin", DTYPES["offsets"], mode="r")
    with (folder / "weight_sums.bin").open("wb") as file:
        for first in range(0, len(offsets) - 1, SAMPLES_AT_ONCE):
            bounds = offsets[first : first + SAMPLES_AT_ONCE + 1]
            of_samples = weights[bounds[0] : bounds[-1]]
            sums = np.add.reduceat(of_samples, bounds[:-1] - bounds[0], dtype=WEIGHT_DTYPES["weight_sums"])
            file.write(sums.tobytes())
