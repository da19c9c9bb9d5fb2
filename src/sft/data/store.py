"""Samples on disk: made once, memory-mapped ever after.

    cache/stores/<key>/       key: sha256 of data, tokenizer, row function, settings and code
        input_ids.bin         int32 [num_tokens]       all samples end to end
        supervised.bin        uint8 [num_tokens]       1 where the token carries loss
        offsets.bin           int64 [num_samples + 1]  sample i is tokens offsets[i] to offsets[i + 1]
        lengths.bin           int32 [num_samples]
        num_supervised.bin    int32 [num_samples]
        rows.bin              int64 [num_samples]      the row of its source that a sample came from
        content.bin           uint64 [num_samples]     a hash of all samples of that row
        meta.json             the ledger

A store is written in a folder of its own and renamed once complete, so it is there whole or not at all; of
several processes that build the same one the first wins. No file locks: some cluster file systems ignore
them.
"""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft.data import ledger
from sft.data.build import DTYPES, RowFunction, build
from sft.data.fingerprint import data_fingerprint, mask_fingerprint
from sft.data.mask import IGNORE, Tokenization
from sft.data.rows import Source
from sft.errors import UserError

FORMAT = 1  # of the files above; part of the key
UNWRITABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # full
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR),  # not ours, or in the way
}


class Store:
    """The samples of some sources, in row order. Opening it reads nothing but meta.json."""

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.fingerprint = folder.name
        self.data_fingerprint: str = meta["data_fingerprint"]
        # By order alone: the same content may lie elsewhere next time.
        self.ledger: dict[str, Any] = {
            "sources": [
                {"source": str(source), **counts} for source, counts in zip(sources, meta["sources"], strict=True)
            ]
        }
        self._ends = np.cumsum([counts["samples"] for counts in meta["sources"]])
        arrays = {
            name: np.asarray(np.memmap(folder / f"{name}.bin", dtype, mode="r")) for name, dtype in DTYPES.items()
        }
        self.lengths = arrays["lengths"]  # int32 [num_samples], tokens
        self.num_supervised = arrays["num_supervised"]  # int32 [num_samples], tokens
        self.content = arrays["content"]  # uint64 [num_samples], equal for equal rows
        self._input_ids, self._supervised = arrays["input_ids"], arrays["supervised"]
        self._offsets, self._rows = arrays["offsets"], arrays["rows"]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """`(input_ids, labels)`, both int32 [length]; labels are IGNORE where there is no loss."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self._offsets[i], self._offsets[i + 1]
        input_ids = self._input_ids[begin:end]
        return input_ids, np.where(self._supervised[begin:end], input_ids, np.int32(IGNORE))

    def source(self, i: int) -> str:
        """Name of the source that sample i came from."""
        at = int(np.searchsorted(self._ends, i, side="right"))
        return str(self.ledger["sources"][at]["source"])

    def row(self, i: int) -> int:
        """Number, counted from 0, of the row of its source that sample i came from."""
        return int(self._rows[i])


def build_or_open(
    sources: Sequence[Source],
    row_function: RowFunction,
    tokenization: Tokenization,
    cache_dir: Path,
    *,
    num_workers: int,
    max_lost: float,
    wait: bool = False,
    log: Callable[[str], None] = print,
) -> Store:
    """The store of these sources, built in `num_workers` processes if it isn't there.

    With `wait` (all ranks but one) it is never built but waited for. UserError for rows that cannot be read,
    where more than the share `max_lost` of them lost a sample, and where nothing is left to train on.
    """
    data = [data_fingerprint(source, cache_dir) for source in sources]
    mask = mask_fingerprint(tokenization, row_function)
    key = hashlib.sha256(json.dumps([FORMAT, data, mask]).encode()).hexdigest()
    folder = cache_dir / "stores" / key
    if not folder.exists():
        if wait:
            _await(folder, log)
        else:
            about = {"data_fingerprint": hashlib.sha256("".join(data).encode()).hexdigest()}
            try:
                build(folder, about, sources, row_function, tokenization, num_workers, log)
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise UserError(
                    f"{cache_dir}: the token store cannot be written ({error.strerror or error}): make room "
                    "or set data.cache_dir to another folder"
                ) from error
    store = Store(folder, sources)
    ledger.check(store.ledger["sources"], max_lost)  # on opening too: max_lost is no part of the key
    return store


def _await(folder: Path, log: Callable[[str], None]) -> None:
    started = time.monotonic()
    next_line = 30.0
    while not folder.exists():
        time.sleep(0.2)
        if (waited := time.monotonic() - started) > next_line:
            log(f"waiting {waited:.0f} s for the token store that rank 0 builds")
            next_line += 30.0
