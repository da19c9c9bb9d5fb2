"""Rank processes that stay: started once, they run one fit after the other in the same process group.

They are forked from a server that has imported what takes seconds, see the processor alone or this machine's GPUs, and
reach each other over the loopback interface.
"""

import gc
import multiprocessing
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

PROCESSES = multiprocessing.get_context("forkserver")
STARTING = threading.Lock()  # forks from two threads at once aren't safe, and some libraries refuse them
SHARED = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
# What each kind of rank is started with, and imported before. With CUDA a process must not touch it before it forks:
# torch then asks the driver's library whether there is a GPU, and DeepSpeed isn't imported.
ENVIRONMENT = {
    "cpu": SHARED | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    "gpu": SHARED | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
}
PRELOADED = {
    "cpu": ["lightning", "deepspeed", "transformers", "sft.training.fit"],
    "gpu": ["lightning", "transformers", "sft.training.fit"],
}
# What would make Lightning believe that a cluster had started these processes.
CLUSTER = ("SLURM_", "TORCHELASTIC_", "PMI_", "OMPI_", "JSM_", "LSB_", "KUBERNETES_")


@contextmanager
def seeing(device: str) -> Iterator[None]:
    """Sets this process, and the server that is started by it, up for ranks on the `cpu` or the `gpu`; with `cpu`
    accelerators are hidden."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT[device]}
    os.environ.update(ENVIRONMENT[device])
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class RankError(Exception):
    """A rank failed, died or didn't answer in time; all of its group are stopped."""


class Pool:
    """`num_ranks` processes of one process group.

    Args:
        folder: for what the ranks print and where they find each other.
        device: cpu or gpu.
        before: called in each process first. Tests break the training path with it.
    """

    def __init__(
        self, num_ranks: int, folder: Path, device: str = "cpu", before: Callable[[], None] | None = None
    ) -> None:
        self.num_ranks, self.folder, self.device, self.before = num_ranks, folder, device, before
        self._ranks: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
        """What `function(*arguments)` returns on rank 0 when all ranks have called it; RankError otherwise."""
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, arguments))
        answers: dict[int, Any] = {}
        deadline = monotonic() + timeout
        while len(answers) < self.num_ranks:
            waiting = [rank for rank in range(self.num_ranks) if rank not in answers]
            ready = wait([self._ranks[rank][1] for rank in waiting], max(0.0, deadline - monotonic()))
            if not ready:
                self.stop(at_once=True)
                raise RankError(f"rank {waiting[0]} gave no answer within {timeout:g} s")
            for rank in (rank for rank in waiting if self._ranks[rank][1] in ready):
                try:
                    failure, answers[rank] = self._ranks[rank][1].recv()
                except (EOFError, ConnectionError):
                    failure = f"died: {self._tail(rank)}"
                if failure:  # the others may wait for it in a collective for ever
                    self.stop(at_once=True)
                    raise RankError(f"rank {rank} {failure}")
        return answers[0]

    def stop(self, at_once: bool = False) -> None:
        """Ends all processes; a later call starts others."""
        for _, connection in self._ranks:
            with suppress(OSError):  # it has died
                connection.send(None)
            connection.close()
        for process, _ in self._ranks:
            process.join(0 if at_once else 5)
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        meeting = self.folder / f"meeting-{secrets.token_hex(8)}"  # no group may find the file of another
        PROCESSES.set_forkserver_preload(PRELOADED[self.device])
        for rank in range(self.num_ranks):
            here, there = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=_serve,
                args=(there, rank, self.num_ranks, self.device, str(meeting), str(self._log(rank)), self.before),
                daemon=True,
            )
            with STARTING:
                process.start()
            there.close()
            self._ranks.append((process, here))

    def _log(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.log"

    def _tail(self, rank: int) -> str:
        lines = self._log(rank).read_text(errors="replace").strip().splitlines() if self._log(rank).exists() else []
        return lines[-1] if lines else "it printed nothing"


def _serve(
    connection: Connection,
    rank: int,
    num_ranks: int,
    device: str,
    meeting: str,
    log: str,
    before: Callable[[], None] | None,
) -> None:
    """A rank: answers calls with (failure, result) until the other end is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for name in [name for name in os.environ if name.startswith(CLUSTER)]:
        del os.environ[name]
    os.environ.update(
        ENVIRONMENT[device],
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        GROUP_RANK="0",
        WORLD_SIZE=str(num_ranks),
    )

    import torch
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from sft.training.prepare import quiet

    torch.set_num_threads(1)
    quiet()
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
    while True:
        try:
            call = connection.recv()
        except EOFError:
            break
        if call is None:
            break
        try:
            function, arguments = call
            connection.send((None, function(*arguments)))
        except Exception as error:
            traceback.print_exc()
            connection.send((f"raised {type(error).__name__}: {' '.join(str(error).split())[:300]}", None))
    # Gloo's threads may outlive the interpreter and abort it: leave without its teardown.
    sys.stdout.flush()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)


def _end_with_parent() -> None:
    """A rank in a collective doesn't see that its parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
