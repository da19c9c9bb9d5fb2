"""The making of a token store: rows in chunks to worker processes, their samples in row order to disk."""

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
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from sft.data import ledger
from sft.data.conversation import Conversation, Empty
from sft.data.mask import IGNORE, Tokenization
from sft.data.rows import Source, load_rows
from sft.errors import UserError
from sft.runs.files import fsync
from sft.runs.process import exit_with_parent
from sft.runs.signals import shielded

if TYPE_CHECKING:
    from datasets import Dataset

RowFunction = Callable[[Mapping[str, Any]], Conversation | Empty]

DTYPES: dict[str, type[np.generic]] = {
    "input_ids": np.int32,
    "supervised": np.uint8,
    "offsets": np.int64,
    "lengths": np.int32,
    "num_supervised": np.int32,
    "rows": np.int64,
    "content": np.uint64,
}
CHUNK = 250  # rows to a task of a worker
NUM_ROWS_WORTH_WORKERS = 5_000  # below, their start takes longer than the work


@dataclass(frozen=True)
class _Job:
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
    arrays: dict[str, np.ndarray]  # of DTYPES, all but the offsets
    reasons: list[tuple[int, frozenset[str]]]  # (row, why samples of it were lost or cut)


def build(
    folder: Path,
    about: Mapping[str, Any],
    sources: Sequence[Source],
    row_function: RowFunction,
    tokenization: Tokenization,
    num_workers: int,
    log: Callable[[str], None],
) -> None:
    """Make the store and publish it as `folder`; `about` goes to its meta.json. Leaves nothing else behind.

    UserError for bad rows, and where no sample is left; OSError where the disk is full or cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    staging = folder.parent / f"{_staging_prefix(folder)}{os.getpid()}-{secrets.token_hex(4)}"
    unfinished = staging / "store"
    try:
        unfinished.mkdir(parents=True)
        rows = [load_rows(source, staging / "datasets") for source in sources]
        job = _Job(rows, [str(source) for source in sources], row_function, tokenization)
        counts = _write(unfinished, job, num_workers, log)
        named = [{"source": name, **each} for name, each in zip(job.names, counts, strict=True)]
        ledger.check(named, max_lost=1.0)  # a store without samples is never published
        (unfinished / "meta.json").write_text(json.dumps({**about, "sources": counts}, indent=1))
        for path in (*unfinished.iterdir(), unfinished):
            fsync(path)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            # Another process was faster; what it made is the same.
        fsync(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write(folder: Path, job: _Job, num_workers: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    """Write all samples, in row order whatever the number of workers. Returns the counts of each source."""
    counts = [ledger.empty() for _ in job.rows]
    num_rows, num_done, num_tokens = sum(map(len, job.rows)), 0, 0
    started = time.monotonic()
    next_line = 2.0
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {name: stack.enter_context((folder / f"{name}.bin").open("wb")) for name in DTYPES}
        files["offsets"].write(np.zeros(1, DTYPES["offsets"]).tobytes())
        for chunk in _chunks(job, num_workers):
            offsets = num_tokens + np.cumsum(chunk.arrays["lengths"], dtype=np.int64)
            for name, values in {**chunk.arrays, "offsets": offsets}.items():
                files[name].write(values.tobytes())
            ledger.add(counts[chunk.source], chunk.num_rows, chunk.arrays, chunk.reasons)
            num_tokens += len(chunk.arrays["input_ids"])
            num_done += chunk.num_rows
            if (elapsed := time.monotonic() - started) > next_line:
                log(f"token store: {num_done:,} of {num_rows:,} rows, {num_done / elapsed:,.0f} rows/s")
                next_line = elapsed + 10.0
    return counts


def _chunks(job: _Job, num_workers: int) -> Iterator[_Chunk]:
    ranges = [
        (source, begin, min(begin + CHUNK, len(rows)))
        for source, rows in enumerate(job.rows)
        for begin in range(0, len(rows), CHUNK)
    ]
    if num_workers <= 1 or sum(map(len, job.rows)) < NUM_ROWS_WORTH_WORKERS:
        for each in ranges:
            yield _tokenize(job, *each)
        return
    # Not forked: the parent may hold threads and GPUs.
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(min(num_workers, len(ranges)), context, _start_worker, (job,))
    try:
        pending: deque[Future[_Chunk]] = deque()
        for each in ranges:
            with shielded([signal.SIGUSR1]):  # SIGTERM is how the pool itself ends a worker
                pending.append(workers.submit(_work, *each))  # starts one, until all are there
            if len(pending) > 2 * num_workers:  # no more results in memory than keep the workers busy
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that builds the token store was killed, most likely for want of memory: lower data.num_workers"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)


_job: _Job  # in a worker process


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    exit_with_parent()  # a worker of a killed parent would wait for tasks for ever


def _work(source: int, begin: int, end: int) -> _Chunk:
    return _tokenize(_job, source, begin, end)


def _tokenize(job: _Job, source: int, begin: int, end: int) -> _Chunk:
    columns = job.rows[source][begin:end]
    # As arrays at once: a Python integer takes nine times the room.
    ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    rows, content, reasons = [], [], []
    for number in range(begin, end):
        row = {name: values[number - begin] for name, values in columns.items()}
        try:
            made = job.tokenization(job.row_function(row))
        except UserError as error:
            raise UserError(f"row {number} of {job.names[source]}: {error}") from error
        except Exception as error:
            error.add_note(f"row {number} of {job.names[source]}")
            raise
        digest = hashlib.blake2b(digest_size=8)
        for sample in made.samples:
            ids.append(np.array(sample.input_ids, np.int32))
            masks.append(np.array(sample.labels) != IGNORE)
            digest.update(len(sample.input_ids).to_bytes(8, "little") + ids[-1].tobytes())
        rows += [number] * len(made.samples)
        content += [int.from_bytes(digest.digest(), "little")] * len(made.samples)
        if made.reasons:
            reasons.append((number, made.reasons))
    arrays = {
        "input_ids": np.concatenate(ids),
        "supervised": np.concatenate(masks),
        "lengths": np.array([len(mask) for mask in masks[1:]]),
        "num_supervised": np.array([mask.sum() for mask in masks[1:]]),
        "rows": np.array(rows),
        "content": np.array(content, np.uint64),
    }
    arrays = {name: values.astype(DTYPES[name]) for name, values in arrays.items()}
    return _Chunk(source, end - begin, arrays, reasons)


def _staging_prefix(folder: Path) -> str:
    return f".building-{folder.name}-{socket.gethostname()}-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what builders of this store left behind that were killed on this machine; nothing else can be
    known to be dead."""
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
        return True
    return True
