"""Builds a token store: rows in chunks to worker processes, their samples in row order to disk."""

import hashlib
import json
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft.data import ledger
from sft.data.conversation import RowFunction
from sft.data.ledger import Counts, SourceCounts
from sft.data.mask import IGNORE, Tokenization
from sft.data.rows import Source, load_rows
from sft.data.store import DTYPES, sum_weights
from sft.errors import UserError
from sft.runs.files import fsync
from sft.runs.process import exit_with_parent
from sft.runs.signals import shielded

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 250  # rows to a task of a worker
NUM_ROWS_WORTH_WORKERS = 5_000  # with fewer, starting the workers takes longer than the work


@dataclass(frozen=True)
class _Work:
    """What a worker process needs, sent to it once."""

    rows: "list[Dataset]"
    names: list[str]  # of the sources
    row_function: RowFunction
    tokenization: Tokenization


@dataclass(frozen=True)
class _Chunk:
    """The samples of a range of one source's rows."""

    source: int
    num_rows: int
    lengths: NDArray[np.int32]
    num_supervised: NDArray[np.int32]
    columns: dict[str, bytes]  # of DTYPES, all but the offsets
    reasons: list[tuple[int, frozenset[str]]]  # (row, why samples of it were lost or cut)


def build_store(
    folder: Path,
    meta: Mapping[str, object],
    sources: Sequence[Source],
    row_function: RowFunction,
    tokenization: Tokenization,
    num_workers: int,
    log: Callable[[str], None],
) -> None:
    """Builds the store and publishes it as `folder`, with `meta` in its meta.json. Leaves nothing else behind.

    UserError for bad rows, and if no sample is left; OSError if the disk is full or cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    staging = folder.parent / f"{_staging_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = staging / "store"
    try:
        unfinished.mkdir(parents=True)
        rows = [load_rows(source, staging / "datasets") for source in sources]
        work = _Work(rows, [str(source) for source in sources], row_function, tokenization)
        counts = _write(unfinished, work, num_workers, log)
        sum_weights(unfinished)
        named: list[SourceCounts] = [
            {"source": name, **of_source} for name, of_source in zip(work.names, counts, strict=True)
        ]
        ledger.check(named, max_lost=1.0)  # a store without samples is never published
        (unfinished / "meta.json").write_text(json.dumps({**meta, "sources": counts}, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            fsync(path)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster; its store is the same.
        fsync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path, work: _Work, num_workers: int, log: Callable[[str], None]) -> list[Counts]:
    """Writes all samples, in row order whatever the number of workers. Returns the counts of each source."""
    counts = [ledger.empty() for _ in work.rows]
    num_rows, num_done, num_tokens = sum(map(len, work.rows)), 0, 0
    started = time.monotonic()
    next_line = 2.0
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in DTYPES}
        files["offsets"].write(np.zeros(1, DTYPES["offsets"]).tobytes())
        for chunk in _chunks(work, num_workers):
            offsets = num_tokens + np.cumsum(chunk.lengths, dtype=np.int64)
            for name, values in {**chunk.columns, "offsets": offsets.tobytes()}.items():
                files[name].write(values)
            ledger.add(counts[chunk.source], chunk.num_rows, chunk.lengths, chunk.num_supervised, chunk.reasons)
            num_tokens += int(chunk.lengths.sum(dtype=np.int64))
            num_done += chunk.num_rows
            if (elapsed := time.monotonic() - started) > next_line:
                log(f"token store: {num_done:,} of {num_rows:,} rows, {num_done / elapsed:,.0f} rows/s")
                next_line = elapsed + 10.0
    return counts


def _chunks(work: _Work, num_workers: int) -> Iterator[_Chunk]:
    ranges = [
        (source, begin, min(begin + CHUNK, len(rows)))
        for source, rows in enumerate(work.rows)
        for begin in range(0, len(rows), CHUNK)
    ]
    if num_workers <= 1 or sum(map(len, work.rows)) < NUM_ROWS_WORTH_WORKERS:
        for source, begin, end in ranges:
            yield _tokenize(work, source, begin, end)
        return
    # Not forked: the parent may hold threads and GPUs.
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(min(num_workers, len(ranges)), context, _start_worker, (work,))
    try:
        pending: deque[Future[_Chunk]] = deque()
        for source, begin, end in ranges:
            with shielded([signal.SIGUSR1]):  # not SIGTERM, by which the pool itself ends a worker
                pending.append(workers.submit(_tokenize_chunk, source, begin, end))  # starts a worker, up to the limit
            if len(pending) > 2 * num_workers:  # no more results in memory than keep the workers busy
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that builds the token store was killed, most likely for lack of memory: lower data.num_workers"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)


_work: _Work  # in a worker process


def _start_worker(work: _Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process a core already
    exit_with_parent()  # or it would wait for a killed parent's tasks forever


def _tokenize_chunk(source: int, begin: int, end: int) -> _Chunk:
    return _tokenize(_work, source, begin, end)


def _tokenize(work: _Work, source: int, begin: int, end: int) -> _Chunk:
    columns = work.rows[source][begin:end]
    # Arrays from the start: a Python integer takes nine times the memory.
    ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    rows, content, reasons = [], [], []
    for number in range(begin, end):
        row = {name: values[number - begin] for name, values in columns.items()}
        try:
            tokenized = work.tokenization(work.row_function(row))
        except UserError as error:
            raise UserError(f"row {number} of {work.names[source]}: {error}") from error
        except Exception as error:
            error.add_note(f"row {number} of {work.names[source]}")
            raise
        digest = hashlib.blake2b(digest_size=8)
        for sample in tokenized.samples:
            ids.append(np.array(sample.input_ids, np.int32))
            masks.append(np.array(sample.labels) != IGNORE)
            digest.update(len(sample.input_ids).to_bytes(8, "little") + ids[-1].tobytes())
        rows += [number] * len(tokenized.samples)
        content += [int.from_bytes(digest.digest(), "little")] * len(tokenized.samples)
        if tokenized.reasons:
            reasons.append((number, frozenset(tokenized.reasons)))
    lengths = np.array([len(mask) for mask in masks[1:]], np.int32)
    num_supervised = np.array([mask.sum() for mask in masks[1:]], np.int32)
    values = {
        "input_ids": np.concatenate(ids),
        "supervised": np.concatenate(masks),
        "lengths": lengths,
        "num_supervised": num_supervised,
        "rows": np.array(rows),
        "content": np.array(content, np.uint64),
    }
    bytes_of = {name: array.astype(DTYPES[name]).tobytes() for name, array in values.items()}
    return _Chunk(source, end - begin, lengths, num_supervised, bytes_of, reasons)


def _staging_prefix(folder: Path) -> str:
    return f".building-{folder.name}-{socket.gethostname()}-"


def _remove_leftovers(folder: Path) -> None:
    """Removes the staging folders of killed builders of this store on this machine; others may still be alive."""
    prefix = _staging_prefix(folder)
    for path in folder.parent.glob(f"{prefix}*"):
        match = re.fullmatch(r"(\d+)-[0-9a-f]+", path.name.removeprefix(prefix))
        if match and not _is_alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
