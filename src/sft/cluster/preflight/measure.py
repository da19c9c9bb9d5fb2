"""What each rank of sft.cluster.preflight measures. A node's first rank, its leader, looks at the node; all of them
meet and reduce. After each stage the rank's file in the shared folder says how far it has come."""

import fcntl
import hashlib
import json
import os
import shutil
import statistics
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from sft.cluster.preflight import gpus
from sft.cluster.preflight.judge import DONE
from sft.runs import provenance

TOKEN_WAIT = 60  # seconds for a file to be seen on other nodes: NFS remembers for as long that there is none
PING_PONGS = 20  # the quickest tells the offset best
REDUCTIONS = 7  # of which the first two warm up
REDUCED_MB = {"cuda": 512, "cpu": 16}  # enough to be limited by bandwidth


class Rank:
    """This process, among those that srun has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = os.environ["SLURMD_NODENAME"]
        self.rank, self.num_ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        self.local_rank = int(os.environ["SLURM_LOCALID"])
        self.leader = self.local_rank == 0
        self.stage = "start"
        self.report: dict[str, Any] = {}
        self.note(node=self.node, rank=self.rank, local_rank=self.local_rank, num_ranks=self.num_ranks)

    def note(self, stage: str | None = None, **measured: Any) -> None:
        """Leaves behind what is known by now, and which stage begins."""
        self.stage = stage or self.stage
        self.report |= {"stage": self.stage, **measured}
        path = self.folder / f"rank-{self.rank}.json"
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.report))
        os.replace(unfinished, path)

    def check(self, write_mb: int, timeout: float) -> None:
        """All stages.

        Args:
            write_mb: MB that each node writes to the shared folder.
            timeout: seconds to wait for the other ranks.
        """
        token = self.folder / "token"
        if self.rank == 0:
            token.touch()
        if self.leader:
            self.note("node")
            self.note(**look(self.folder))
            self.note("shared folder")
            self.note(shared_s=seen_after(token))
            self.note("write speed")
            self.note(write_mb_s=write_speed(self.folder / f"written-{self.rank}", write_mb))
        self._meet(timeout)
        self.note("clock")
        self.note(**self._clock())
        self.note("locks")
        self.note(**self._locks())
        self.note("all-reduce")
        self.note(DONE, **self._reduce())
        with suppress(RuntimeError):
            self._barrier()  # the first rank keeps the store, without which others can't finish

    def _meet(self, timeout: float) -> None:
        """Makes the process group, once it is known that all are there."""
        import torch
        import torch.distributed as dist

        self.note("connecting")
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        address, port, within = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=timeout)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                address, port, self.num_ranks, self.rank == 0, within, wait_for_workers=False
            )
        except dist.DistError as error:
            raise RuntimeError(f"{address}:{port} can't be reached in {timeout:.0f} s") from error
        self.note("meeting")
        store.set(f"place{self.rank}", json.dumps([self.node, self.local_rank]))
        places = {f"place{rank}": rank for rank in range(self.num_ranks)}
        try:
            store.wait(list(places), within)
        except dist.DistError as error:
            raise RuntimeError(f"waited {timeout:.0f} s in vain for ranks that didn't come") from error
        # Of each rank its node, and the leaders, by rank.
        known = [json.loads(store.get(place)) for place in places]
        self.nodes = [node for node, _ in known]
        self.leaders = [rank for rank, (_, local_rank) in enumerate(known) if local_rank == 0]
        # Gloo beside NCCL, for all that isn't about GPUs.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.num_ranks, timeout=within)
        self._barrier()

    def _barrier(self) -> None:
        import torch
        import torch.distributed as dist

        dist.all_reduce(torch.zeros(1))

    def _clock(self) -> dict[str, Any]:
        """Seconds by which this node's clock is ahead of the first one's, by the round trip that took least."""
        import torch
        import torch.distributed as dist

        first, measured = self.leaders[0], {}
        for leader in self.leaders[1:]:
            if self.rank not in (first, leader):
                continue
            trips = []
            for _ in range(PING_PONGS):
                there = torch.zeros(1, dtype=torch.float64)
                if self.rank == first:
                    dist.recv(there, leader)
                    dist.send(torch.tensor([time.time()], dtype=torch.float64), leader)
                else:
                    sent = time.time()
                    dist.send(there, first)
                    dist.recv(there, first)
                    received = time.time()
                    trips.append((received - sent, (sent + received) / 2 - there.item()))
            if trips:
                measured = {"clock_s": min(trips)[1]}
        self._barrier()
        return measured

    def _locks(self) -> dict[str, Any]:
        """Whether a lock that the first node holds is refused to this one."""
        first, others = self.leaders[0], self.leaders[1:]
        measured = {}
        for kind, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
            with open(self.folder / kind, "w") as file:
                for taking in ([first], others):  # one after the other
                    if self.rank in taking:
                        try:
                            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                            measured[kind] = self.rank == first
                        except BlockingIOError:
                            measured[kind] = self.rank != first
                        except OSError:  # there are no locks here
                            measured[kind] = False
                    self._barrier()
        return measured

    def _reduce(self) -> dict[str, Any]:
        """Bus bandwidths over all ranks and between those of this node, in GB/s."""
        import torch.distributed as dist

        megabytes = REDUCED_MB[self.device.type]
        measured: dict[str, Any] = {"all_mb": megabytes, "all_gb_s": self._bandwidth(None, self.num_ranks, megabytes)}
        for node in dict.fromkeys(self.nodes):
            ranks = [rank for rank, each in enumerate(self.nodes) if each == node]
            group = dist.new_group(ranks)  # by all ranks, whoever is in it
            if node == self.node and len(ranks) > 1 and self.device.type == "cuda":
                measured["inside_gb_s"] = self._bandwidth(group, len(ranks), megabytes)
        return measured

    def _bandwidth(self, group: Any, num_ranks: int, megabytes: int) -> float:
        """2 (n−1)/n of the bytes pass each rank's link in an all-reduce; over the median time of some."""
        import torch
        import torch.distributed as dist

        values = torch.empty(megabytes * 10**6 // 4, device=self.device)
        times = []
        for _ in range(REDUCTIONS):
            values.fill_(1)
            self._finish()
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            self._finish()
            times.append(time.perf_counter() - start)
        if not bool((values == num_ranks).all()):
            raise ArithmeticError(f"the sum of {num_ranks} ones came out wrong")
        num_bytes = values.numel() * values.element_size()
        return 2 * (num_ranks - 1) / num_ranks * num_bytes / statistics.median(times[2:]) / 1e9

    def _finish(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()


def look(folder: Path) -> dict[str, Any]:
    """This node's GPUs, versions and free space."""
    import torch

    found = gpus.health()
    code = provenance.collect()
    versions = {"sft": code["commit"], "python": code["python"], **code["versions"], "CUDA": torch.version.cuda}
    if code["uncommitted_diff"]:
        versions["sft's uncommitted changes"] = hashlib.sha256(code["uncommitted_diff"].encode()).hexdigest()[:8]
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    versions["driver"] = ", ".join(sorted({each["driver"] for each in found})) or None
    return {
        "gpus": {
            "allocated": int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
            "visible": torch.cuda.device_count(),
            "health": found,
        },
        "versions": versions,
        "runs_gb": shutil.disk_usage(folder).free / 1e9,
        "tmp_gb": shutil.disk_usage("/tmp").free / 1e9,
        "shm_gb": shutil.disk_usage("/dev/shm").total / 1e9,
    }


def seen_after(path: Path) -> float | None:
    """Seconds until the file is seen; None where it isn't."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < TOKEN_WAIT:
        if path.name in os.listdir(path.parent):  # which asks the server, where `exists` may believe its cache
            return waited
        time.sleep(0.1)
    return None


def write_speed(path: Path, megabytes: int) -> float:
    """MB/s at which a file is written, until it is safe on disk."""
    block = os.urandom(10**6)
    start = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    speed = megabytes / (time.perf_counter() - start)
    path.unlink()
    return speed
