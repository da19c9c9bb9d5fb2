"""What the benchmarks of ranks count is what happens, and a sharded model is loaded in its bound of memory."""

import os
import socket
from pathlib import Path
from threading import Semaphore
from unittest.mock import patch

import pytest

import warm
from benchmarks import ranks
from benchmarks.ranks import bytes_sent
from benchmarks.shapes import SHAPES, flops
from benchmarks.strategies import volume


def test_bytes_sent_are_those_of_this_process() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            before = bytes_sent()
            client.sendall(bytes(100_000))
            assert len(accepted.recv(100_000, socket.MSG_WAITALL)) == 100_000
            accepted.sendall(bytes(1))
            client.recv(1)
            assert bytes_sent() - before == 100_001


def test_peak_is_seen_though_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = Semaphore(0)
    look = ranks.now

    def counted() -> tuple[int, int]:
        looks.release()
        return look()

    monkeypatch.setattr(ranks, "now", counted)
    with ranks.Peak(every=0.001) as peak:
        largest = bytearray(b"1" * 64_000_000)
        while looks.acquire(blocking=False):
            pass
        looks.acquire()  # this one may have begun before
        looks.acquire()
        looks.acquire()
        del largest
    assert 64e6 <= peak.resident < 160e6 and 64e6 <= peak.private < 160e6


@pytest.mark.parametrize(
    ("strategy", "models"),
    # Eight ranks, four micro-batches; a ring sends 7/8 of the model a gather or a reduce-scatter.
    [("single", 0), ("ddp", 2), ("deepspeed_zero1", 2), ("deepspeed_zero2", 5), ("deepspeed_zero3", 12), ("fsdp2", 12)],
)
def test_volume_is_that_of_the_literature(strategy: str, models: int) -> None:
    assert volume(strategy, 8, 4, scatter=7 / 8) == pytest.approx(models * 7 / 8)


def test_flops_of_a_known_model() -> None:
    # Llama 3 8B has 6,979,321,856 weights in its layers' matrices and 525,336,576 in its head.
    tokens = 1000
    whole = 6 * (6_979_321_856 + 525_336_576 // 2) * tokens + 6 * 32 * 4096 * 500 * tokens
    assert flops(SHAPES["llama-8b"]).of(tokens, tokens // 2, 500 * tokens) == whole
    # The adapter of rank 16 beside each of its linear layers has 41,943,040.
    frozen = whole - 2 * (6_979_321_856 + 525_336_576 // 2) * tokens
    assert flops(SHAPES["llama-8b"], 16).of(tokens, tokens // 2, 500 * tokens) == frozen + 6 * 41_943_040 * tokens


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_a_rank_loads_its_share_and_no_more(strategy: str, tmp_path: Path) -> None:
    warm.start()
    sizes = {"vocab": 2000, "hidden": 512, "layers": 12, "max_length": 16}
    options = {**sizes, "global_batch": 2, "steps": 1, "repeats": 1, "seed": 0, "overrides": []}
    with patch.dict(os.environ):
        (model,) = ranks.run("benchmarks.prepare_rank", tmp_path, 1, options)
        results = ranks.run("benchmarks.checkpoint_rank", tmp_path, 2, strategy, "project", options)
    bound = 4 * (model["weights"] / 2 + 2 * model["largest_tensor"])
    # What libraries and the allocator need besides is 5 to 8 MB here; the whole model would be 210 MB, not 113.
    assert max(rank["load"][0]["private"] for rank in results) < bound + 30e6
