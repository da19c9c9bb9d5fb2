"""Several ranks on this machine: how they are started, and what each of them sends and holds.

A rank is forked from a process that has imported everything and done nothing else, so starting one takes no time and
its memory counts from where its own work begins.
"""

import json
import os
import shutil
import socket
import struct
import sys
import threading
from contextlib import AbstractContextManager
from importlib import import_module
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any

FORKS = get_context("forkserver")
PAGE = os.sysconf("SC_PAGE_SIZE")


def run(module: str, folder: Path, num_ranks: int, *arguments: Any) -> list[Any]:
    """What `module.main(folder, rank, num_ranks, *arguments)` returns on each rank."""
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "MASTER_ADDR": "127.0.0.1",
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # whether there is a GPU, without touching it before the fork
    }
    if not shutil.which("nvidia-smi"):
        os.environ["DS_ACCELERATOR"] = "cpu"
    FORKS.set_forkserver_preload(["benchmarks.fit_rank"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children, pipes = [], []
    for rank in range(num_ranks):
        pipe, end = FORKS.Pipe(duplex=False)
        place = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": str(port)} if num_ranks > 1 else {}
        log = str(folder / f"rank-{rank}.log")
        child = FORKS.Process(target=_rank, args=(module, folder, rank, num_ranks, arguments, place, log, end))
        child.start()
        end.close()
        children.append(child)
        pipes.append(pipe)
    results: dict[int, Any] = {}
    while len(results) < num_ranks:
        for pipe in connection.wait([pipe for rank, pipe in enumerate(pipes) if rank not in results]):
            rank = pipes.index(pipe)
            try:
                results[rank] = json.loads(pipe.recv())
            except EOFError:  # the others would wait for it
                for child in children:
                    child.kill()
                sys.exit(f"{module} failed on rank {rank}:\n{(folder / f'rank-{rank}.log').read_text()[-4000:]}")
    for child in children:
        child.join()
    return [results[rank] for rank in range(num_ranks)]


def _rank(
    module: str, folder: Path, rank: int, num_ranks: int, arguments: Any, place: dict[str, str], log: str, pipe: Any
) -> None:
    os.environ |= place
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    pipe.send(json.dumps(import_module(module).main(folder, rank, num_ranks, *arguments)))


def bytes_sent() -> int:
    """Bytes that this process has handed to its TCP connections (Linux), as the kernel counts them: all that gloo
    sends, whoever called it, and nothing of other processes."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            connected = socket.socket(fileno=os.dup(int(name)))
        except OSError:  # no socket, or closed meanwhile
            continue
        with connected:
            if connected.family in (socket.AF_INET, socket.AF_INET6) and connected.type == socket.SOCK_STREAM:
                info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent, sent_again = struct.unpack_from("QQ", info, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                total += sent - sent_again
    return total


class Peak(AbstractContextManager["Peak"]):
    """Bytes by which this process's memory grew at most while this lasts (Linux).

    `resident` counts the pages of mapped files as well, which the system takes back when it needs them, and is the
    kernel's own maximum. `private` is what no file backs, looked at every few milliseconds.
    """

    resident = private = 0

    def __init__(self, every: float = 0.003) -> None:
        self.every = every

    def __enter__(self) -> "Peak":
        self._before = now()
        self._largest = 0
        Path("/proc/self/clear_refs").write_text("5")  # the kernel's maximum starts anew
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._sampler.join()
        highest = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
        self.resident = highest - self._before[0]
        self.private = self._largest - self._before[1]

    def _sample(self) -> None:
        while True:
            self._largest = max(self._largest, now()[1])
            if self._over.wait(self.every):
                return


def now() -> tuple[int, int]:
    """Bytes of this process's resident set, and of it those that no file backs."""
    resident, shared = (int(pages) for pages in Path("/proc/self/statm").read_text().split()[1:3])
    return resident * PAGE, (resident - shared) * PAGE
