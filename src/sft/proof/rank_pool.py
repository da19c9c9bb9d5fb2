"""Rank processes that run one fit after another in the same process group.

They are forked from a server that has done the slow imports. They see the processor alone or this machine's GPUs, and
connect over the loopback interface.
"""

import gc
import multiprocessing
import os
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from sft.runs.process import exit_with_parent
from sft.training.prepare import quiet

Task = TypeVar("Task")
Answer = TypeVar("Answer")

PROCESSES = multiprocessing.get_context("forkserver")
STARTING = threading.Lock()  # forks from two threads at once aren't safe, and some libraries refuse them
SHARED = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# The environment of each kind of rank, and the modules that are imported before the fork. A process must not touch CUDA
# before it forks, so torch asks the driver's library whether there is a GPU, and DeepSpeed isn't imported.
ENVIRONMENT = {
    "cpu": SHARED | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    "gpu": SHARED | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
}
PRELOADED = {
    "cpu": ["lightning", "deepspeed", "torch._inductor.compile_fx", "transformers", "sft.training.fit"],
    "gpu": ["lightning", "transformers", "sft.training.fit"],
}
# Variables of launchers and batch systems begin with these. With them a process would take itself for a rank of theirs.
LAUNCHERS = (
    *("SLURM_", "SLURMD_", "PMI_", "PMIX_", "OMPI_", "TORCHELASTIC_", "JSM_", "LSB_", "KUBERNETES_"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


@contextmanager
def seeing(device: str) -> Iterator[None]:
    """Prepares this process, and the server that it starts, for ranks on the `cpu` or `gpu`; `cpu` hides GPUs."""
    saved = {name: os.environ.get(name) for name in ENVIRONMENT[device]}
    os.environ.update(ENVIRONMENT[device])
    try:
        yield
    finally:
        for name, value in saved.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class RankError(Exception):
    """A rank failed, died or didn't answer in time; all ranks of its group are stopped."""


@dataclass
class Pool:
    """`num_ranks` processes of one process group."""

    num_ranks: int
    folder: Path  # for the ranks' output and the file that they connect by
    device: str = "cpu"  # or gpu
    before: Callable[[], None] | None = None  # called in each process first, e.g. to plant a fault
    _ranks: list[ProcessPoolExecutor] = field(default_factory=list)  # of one process each

    def __call__(self, function: Callable[..., Answer], *arguments: object, timeout: float) -> Answer:
        """Calls the function on all ranks and returns rank 0's result; RankError if one fails."""
        if not self._ranks:
            self._start()
        with STARTING:
            rank_of = {own.submit(_call, function, *arguments): rank for rank, own in enumerate(self._ranks)}
        answers: dict[int, Answer] = {}
        failure = None
        try:
            for future in as_completed(rank_of, timeout):
                rank = rank_of[future]
                answers[rank] = future.result()
        except RankError as error:
            failure = f"rank {rank} {error}"
        except BrokenProcessPool:
            failure = f"rank {rank} died: {self._last_line(rank)}"
        except TimeoutError:
            failure = f"rank {min(set(rank_of.values()) - answers.keys())} gave no answer within {timeout:g} s"
        finally:
            if len(answers) < self.num_ranks:  # one of them may wait for another in a collective for ever
                self.stop()
        if failure:
            raise RankError(failure)
        return answers[0]

    def stop(self) -> None:
        """Ends all processes, whatever they do; a later call starts new ones."""
        for rank in self._ranks:
            for process in list((rank._processes or {}).values()):
                process.kill()
            rank.shutdown(cancel_futures=True)
        self._ranks = []

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        meeting = self.folder / f"meeting-{secrets.token_hex(8)}"  # no group may find the file of another
        PROCESSES.set_forkserver_preload(PRELOADED[self.device])
        for rank in range(self.num_ranks):
            place = (rank, self.num_ranks, self.device, meeting, self._log(rank), self.before)
            self._ranks.append(ProcessPoolExecutor(1, PROCESSES, _begin, place))

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def _last_line(self, rank: int) -> str:
        log = self._log(rank)
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        return lines[-1] if lines else "it printed nothing"


def share_out(pools: list[Pool], tasks: list[Task], work: Callable[[Pool, Task], Answer]) -> list[Answer]:
    """`work(pool, task)` of each task, in the order of the tasks; each pool does one at a time."""
    idle: SimpleQueue[Pool] = SimpleQueue()
    for pool in pools:
        idle.put(pool)

    def work_on(task: Task) -> Answer:
        pool = idle.get()
        try:
            return work(pool, task)
        finally:
            idle.put(pool)

    threads = ThreadPoolExecutor(len(pools))
    try:
        return list(threads.map(work_on, tasks))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # if interrupted, tasks not yet begun never begin


def _begin(rank: int, num_ranks: int, device: str, meeting: Path, log: Path, before: Callable[[], None] | None) -> None:
    """Makes this process a rank."""
    exit_with_parent()  # a rank in a collective doesn't see that its parent was killed
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    places = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": num_ranks}
    os.environ |= ENVIRONMENT[device] | {name: str(place) for name, place in places.items()}
    torch.set_num_threads(1)
    quiet()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves to a warning at the end
    rank_zero_only.rank = rank  # type: ignore[attr-defined]  # the server set it before there were ranks
    if num_ranks > 1:
        backend = "gloo"
        if device == "gpu":
            backend = "nccl"
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=num_ranks)
    if before:
        before()
    gc.freeze()  # or each collection, and a fit makes some, goes through all that was imported


def _call(function: Callable[..., Answer], *arguments: object) -> Answer:
    try:
        return function(*arguments)
    except BaseException as error:
        traceback.print_exc()
        raise RankError(f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}") from None
