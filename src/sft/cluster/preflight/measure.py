"""The measurements of each rank of sft.cluster.preflight. The first rank of a node, its leader, examines the node; all
ranks meet and reduce. After each stage the rank's file in the shared folder names the next."""

import hashlib
import json
import os
import shutil
import statistics
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from sft.cluster.preflight import gpus
from sft.cluster.preflight.judge import DONE
from sft.runs import files, provenance

TOKEN_WAIT = 60  # seconds for a file to be seen on other nodes: NFS remembers for as long that it was missing
NUM_REDUCTIONS = 7  # the first two warm up
REDUCED_MB = {"cuda": 512, "cpu": 16}  # enough for bandwidth to be the limit


class Rank:
    """This process, one of those that srun started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.node = os.environ["SLURMD_NODENAME"]
        self.rank, self.num_ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
        self.local_rank = int(os.environ["SLURM_LOCALID"])
        self.leader = self.local_rank == 0
        self.stage = "start"
        self.report: dict[str, object] = {}
        self.note(node=self.node, rank=self.rank, local_rank=self.local_rank, num_ranks=self.num_ranks)

    def begin(self, stage: str) -> None:
        self.stage = stage
        self.note()

    def note(self, **measured: object) -> None:
        """Adds measurements to this rank's file, which also names the current stage."""
        self.report |= {"stage": self.stage, **measured}
        files.write_json(self.folder / f"rank-{self.rank}.json", self.report)

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
            self.begin("node")
            self.note(**examine(self.folder))
            self.begin("shared folder")
            self.note(shared_s=seen_after(token))
            self.begin("write speed")
            self.note(write_mb_s=write_speed(self.folder / f"written-{self.rank}", write_mb))
        self._meet(timeout)
        self.begin("clock")
        self.note(**self._clock())
        self.begin("all-reduce")
        self.note(**self._reduce())
        self.begin(DONE)
        with suppress(RuntimeError):
            self._barrier()  # the first rank holds the store, which the others need until they finish

    def _meet(self, timeout: float) -> None:
        """Makes the process group, once all ranks have come."""
        self.begin("connecting")
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
        self.begin("meeting")
        places = [f"place{rank}" for rank in range(self.num_ranks)]
        store.set(places[self.rank], json.dumps([self.node, self.local_rank]))
        try:
            store.wait(places, within)
        except dist.DistError as error:
            raise RuntimeError(f"waited {timeout:.0f} s in vain for ranks that didn't come") from error
        nodes_and_local_ranks = [json.loads(store.get(place)) for place in places]
        self.nodes = [node for node, _ in nodes_and_local_ranks]  # of each rank
        self.leaders = [rank for rank, (_, local_rank) in enumerate(nodes_and_local_ranks) if local_rank == 0]
        # Gloo in addition to NCCL, for everything outside the GPUs.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.num_ranks, timeout=within)
        self._barrier()

    def _barrier(self) -> None:
        dist.all_reduce(torch.zeros(1))

    def _clock(self) -> dict[str, float]:
        """Seconds by which this node's clock is ahead of the first one's, but for what the barrier's end takes."""
        times = [torch.zeros(1, dtype=torch.float64) for _ in range(self.num_ranks)]
        self._barrier()
        dist.all_gather(times, torch.tensor([time.time()], dtype=torch.float64))
        return {"clock_s": (times[self.rank] - times[self.leaders[0]]).item()}

    def _reduce(self) -> dict[str, float]:
        """Bus bandwidths over all ranks and between those of this node, in GB/s."""
        megabytes = REDUCED_MB[self.device.type]
        measured = {"all_mb": megabytes, "all_gb_s": self._bandwidth(None, self.num_ranks, megabytes)}
        for node in dict.fromkeys(self.nodes):
            ranks = [rank for rank, its_node in enumerate(self.nodes) if its_node == node]
            group = dist.new_group(ranks)  # a call of all ranks, whoever is in the group
            if node == self.node and len(ranks) > 1 and self.device.type == "cuda":
                measured["inside_gb_s"] = self._bandwidth(group, len(ranks), megabytes)
        return measured

    def _bandwidth(self, group: dist.ProcessGroup | None, num_ranks: int, megabytes: int) -> float:
        """Bus bandwidth: 2 (n−1)/n of the bytes, which pass each rank's link in an all-reduce, over its median time."""
        values = torch.empty(megabytes * 10**6 // 4, device=self.device)
        times = []
        for _ in range(NUM_REDUCTIONS):
            values.fill_(1)
            self._synchronize()
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            self._synchronize()
            times.append(time.perf_counter() - start)
        if not bool((values == num_ranks).all()):
            raise ArithmeticError(f"the sum of {num_ranks} ones came out wrong")
        num_bytes = values.numel() * values.element_size()
        return 2 * (num_ranks - 1) / num_ranks * num_bytes / statistics.median(times[2:]) / 1e9

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def examine(folder: Path) -> dict[str, object]:
    """This node's GPUs, versions and free space."""
    health = gpus.health()
    code = provenance.collect()
    versions = {"sft": code["commit"], "python": code["python"], **code["versions"], "CUDA": torch.version.cuda}
    if code["uncommitted_diff"]:
        versions["sft's uncommitted changes"] = hashlib.sha256(code["uncommitted_diff"].encode()).hexdigest()[:8]
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    versions["driver"] = ", ".join(sorted({gpu["driver"] for gpu in health})) or None
    return {
        "gpus": {
            "allocated": int(os.environ.get("SLURM_GPUS_ON_NODE") or 0),
            "visible": torch.cuda.device_count(),
            "health": health,
        },
        "versions": versions,
        "runs_gb": shutil.disk_usage(folder).free / 1e9,
        "tmp_gb": shutil.disk_usage("/tmp").free / 1e9,
        "shm_gb": shutil.disk_usage("/dev/shm").total / 1e9,
    }


def seen_after(path: Path) -> float | None:
    """Seconds until the file is seen; None if it never is."""
    start = time.monotonic()
    while (waited := time.monotonic() - start) < TOKEN_WAIT:
        if path.name in os.listdir(path.parent):  # asks the server, while `exists` may believe its cache
            return waited
        time.sleep(0.1)
    return None


def write_speed(path: Path, megabytes: int) -> float:
    """MB/s at which a file is written and synced to disk."""
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
