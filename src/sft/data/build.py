"""Builds a token store: rows in pieces to worker processes, their samples in row order to disk."""

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from sft.data import ledger
from sft.data.conversation import RowFunction
from sft.data.ledger import SourceCounts
from sft.data.mask import Tokenization
from sft.data.rows import Piece, Source, pieces
from sft.data.samples import Samples, Work, samples_of
from sft.data.staging import Staging
from sft.errors import UserError
from sft.runs.process import exit_with_parent
from sft.runs.signals import shielded

NUM_ROWS_WORTH_WORKERS = 10_000  # with fewer, starting the workers takes longer than the work,
NUM_BYTES_WORTH_WORKERS = 16 << 20  # unless they are long


def build_store(
    folder: Path,
    meta: Mapping[str, object],
    sources: Sequence[Source],
    row_function: RowFunction,
    tokenization: Tokenization,
    num_workers: int,
    log: Callable[[str], None],
    *,
    cache_dir: Path | None = None,
    stop_early: bool = False,
) -> None:
    """Builds the store and publishes it as `folder`, with `meta` in its meta.json. What a killed build of the same
    store has done is not done again. Leaves nothing behind that can't be continued.

    UserError for a source that can't be read, if no sample is left, and, with `stop_early`, soon if all of the first
    rows are lost for one reason. OSError if the disk is full or cannot be written.
    """
    started = time.monotonic()
    next_line = 2.0
    with Staging(folder) as staging:
        progress = staging.progress
        if progress.num_pieces:
            log(f"token store: continued after {ledger.num_rows(progress.counts):,} rows")
        work = Work(row_function, tokenization)
        tasks = islice(_tasks(sources, cache_dir), progress.num_pieces, None)
        for task, samples in _in_order(tasks, work, num_workers):
            while len(progress.counts) <= task.source:
                progress.counts.append(ledger.empty())
            counts = progress.counts[task.source]
            staging.write(samples)
            ledger.add(counts, samples)
            progress.num_pieces += 1
            if stop_early:
                ledger.check_beginning({"source": str(sources[task.source]), **counts})
            staging.save()
            if (elapsed := time.monotonic() - started) > next_line:
                share = (task.source + task.piece.share) / len(sources)
                log(f"token store: {ledger.num_rows(progress.counts):,} rows, {share:.0%}, {elapsed:.0f} s")
                next_line = elapsed + 10.0
        finished = [ledger.finished(counts) for counts in progress.counts]
        named: list[SourceCounts] = [
            {"source": str(source), **counts} for source, counts in zip(sources, finished, strict=True)
        ]
        ledger.check(named, max_lost=1.0)  # a store without samples is never published
        staging.publish({**meta, "sources": finished})
    num_rows, num_samples = ledger.num_rows(finished), sum(counts["samples"] for counts in finished)
    log(f"token store: {num_rows:,} rows, {num_samples:,} samples, {time.monotonic() - started:.1f} s")


@dataclass(frozen=True)
class _Task:
    """A piece of one source's rows. `first`: the number of its first row in the source."""

    source: int
    piece: Piece
    first: int


def _tasks(sources: Sequence[Source], cache_dir: Path | None) -> Iterator[_Task]:
    for number, source in enumerate(sources):
        first = 0
        for piece in pieces(source, cache_dir):
            yield _Task(number, piece, first)
            first += piece.num_rows


def _in_order(tasks: Iterator[_Task], work: Work, num_workers: int) -> Iterator[tuple[_Task, Samples]]:
    """The samples of each task, in the tasks' order. Workers are started if there is enough to do for them."""
    few: deque[_Task] = deque()
    num_rows = num_bytes = 0
    while num_workers > 1 and num_rows < NUM_ROWS_WORTH_WORKERS and num_bytes < NUM_BYTES_WORTH_WORKERS:
        task = next(tasks, None)
        if task is None:
            break
        few.append(task)
        num_rows, num_bytes = num_rows + task.piece.num_rows, num_bytes + task.piece.num_bytes
    else:
        if num_workers > 1:
            yield from _by_workers(chain(few, tasks), work, num_workers)
            return
    for task in chain(few, tasks):
        yield task, samples_of(work, task.piece, task.first)


def _by_workers(tasks: Iterator[_Task], work: Work, num_workers: int) -> Iterator[tuple[_Task, Samples]]:
    # Not forked: the parent may hold threads and GPUs.
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(num_workers, context, _start_worker, (work,))
    try:
        pending: deque[tuple[_Task, Future[Samples]]] = deque()
        for task in tasks:
            with shielded([signal.SIGUSR1]):  # not SIGTERM, by which the pool itself ends a worker
                future = workers.submit(_samples_of, task.piece.without_rows(), task.first)  # may start a worker
            pending.append((replace(task, piece=replace(task.piece, held=None)), future))
            if len(pending) > 2 * num_workers:  # no more results in memory than keep the workers busy
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that builds the token store was killed, most likely for lack of memory: lower data.num_workers"
        ) from error
    finally:
        workers.shutdown(cancel_futures=True)


_work: Work  # in a worker process


def _start_worker(work: Work) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process a core already
    exit_with_parent()  # or it would wait for a killed parent's tasks forever


def _samples_of(piece: Piece, first: int) -> Samples:
    return samples_of(_work, piece, first)
