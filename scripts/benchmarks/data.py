"""`bench data`: packing and step plan, then the token store's building and opening."""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import generated
from benchmarks.build import build
from benchmarks.conditions import rss, table
from sft.data.packing import pack
from sft.data.rows import Source
from sft.data.step_plan import epoch_plan, share
from sft.data.store import Store

GLOBAL_BATCH = 16  # packs an optimizer step


def measure(options: Namespace) -> dict[str, Any]:
    rng = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        return {
            "plan": plan(options, rng),
            "build": build(options, rng, folder),
            "open": open_store(options, rng, folder),
        }


def plan(options: Namespace, rng: np.random.Generator) -> dict[str, float]:
    """Seconds to pack all lengths, to plan an epoch (packing included), and to share out one of its steps."""
    lengths, supervised = generated.lengths(rng, options.samples)
    pack_seconds, (_, starts) = timed(lambda: pack(lengths, options.max_length))
    setting = {"seed": 0, "epoch": 0, "global_batch_size": GLOBAL_BATCH, "max_length": options.max_length}
    plan_seconds, epoch = timed(lambda: epoch_plan(lengths, supervised, packing=True, **setting))
    num_steps = min(1000, epoch.num_steps)
    ranks = {"world_size": 8, "micro_batch_size": 1, "accumulation": 2, "rank": 0}
    step_seconds, _ = timed(lambda: [share(epoch.step(k), lengths, **ranks) for k in range(num_steps)])
    num_packs, num_tokens = len(starts) - 1, int(lengths.sum(dtype=np.int64))
    result = {
        "num_packs": num_packs,
        "fewest_packs": -(-num_tokens // options.max_length),
        "fill": num_tokens / (num_packs * options.max_length),
        "pack_seconds": pack_seconds,
        "plan_seconds": plan_seconds,
        "step_seconds": step_seconds / num_steps,
    }
    packs = f"{result['num_packs']:,} packs ({result['fewest_packs']:,} at least), {result['fill']:.3%} full"
    rows = [
        ["packing", f"{pack_seconds:.2f} s", packs],
        ["plan of an epoch, packing included", f"{plan_seconds:.2f} s", f"{epoch.num_steps:,} steps"],
        ["a step's share of a rank", f"{1e6 * result['step_seconds']:.0f} µs", f"{GLOBAL_BATCH} packs, 8 ranks"],
    ]
    table(
        f"{len(lengths):,} samples of {lengths.mean():.0f} tokens, max_length {options.max_length}",
        ["", "time", ""],
        rows,
    )
    return result


def open_store(options: Namespace, rng: np.random.Generator, folder: Path) -> dict[str, float]:
    """Seconds and memory to open a large store, in a fresh process that has done nothing else."""
    mean = generated.lengths(rng, 10_000)[0].mean()
    tokens, supervised = generated.lengths(rng, int(options.tokens / mean))
    generated.write_store(folder / "large", tokens, supervised, 32_000, rng)
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.data", str(folder / "large")],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    result: dict[str, float] = json.loads(process.stdout)
    # What a file backs are its pages in the system's cache, which gives them up when memory is wanted.
    rows = [
        [name, f"{1e3 * seconds:.1f} ms", f"{resident:.1f}", f"{private:.1f}"]
        for name, (seconds, resident, private) in (
            ("opened", (result["open_seconds"], result["open_mb"], result["open_private_mb"])),
            ("1,000 samples read", (result["read_seconds"], result["read_mb"], result["read_private_mb"])),
        )
    ]
    size = sum(path.stat().st_size for path in (folder / "large").iterdir()) / 1e6
    num_tokens = int(tokens.sum(dtype=np.int64))
    table(
        f"store of {num_tokens:,} tokens, {size:.0f} MB on disk", ["", "time", "RSS grows by MB", "of it private"], rows
    )
    return {"num_tokens": num_tokens, "disk_mb": size, **result}


def opening(folder: Path) -> dict[str, float]:
    """What `open_store` reports, measured in this process."""
    start = rss()
    open_seconds, store = timed(lambda: Store(folder, [Source("generated")]))
    opened = rss()
    some = np.random.default_rng(0).integers(len(store), size=1000)
    read_seconds, _ = timed(lambda: [store[int(i)] for i in some] and None)
    read = rss()
    return {
        "open_seconds": open_seconds,
        "open_mb": (opened[0] - start[0]) / 1e6,
        "open_private_mb": (opened[1] - start[1]) / 1e6,
        "read_seconds": read_seconds,
        "read_mb": (read[0] - opened[0]) / 1e6,
        "read_private_mb": (read[1] - opened[1]) / 1e6,
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = call()
    return time.perf_counter() - begin, result


if __name__ == "__main__":
    print(json.dumps(opening(Path(sys.argv[1]))))
