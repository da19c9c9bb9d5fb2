"""`bench apart`: what it costs that a model can't be packed. The same `sft train` in turn with the samples of a
micro-batch in one row and with a forward pass for each, each run a process of its own."""

import os
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.conditions import table
from benchmarks.tracking import OFF, Run, prepare, train

NAMES = ("packed", "apart")


def measure(options: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        prepare(folder, options)
        runs: dict[str, list[Run]] = {name: [] for name in NAMES}
        for repeat in range(options.repeats):
            for name in NAMES if repeat % 2 == 0 else reversed(NAMES):  # what comes second may be warmer
                runs[name].append(train(folder, options, (*OFF, f"model.isolate={name}")))
                speed = runs[name][-1]["tokens_per_second"]
                print(f"  {repeat + 1} {name:7}{speed:8,.0f} tokens/s   load {os.getloadavg()[0]:.1f}", flush=True)
    speeds = {name: [run["tokens_per_second"] for run in runs[name]] for name in NAMES}
    ratios = [packed / apart for packed, apart in zip(*speeds.values(), strict=True)]
    slower = statistics.median(ratios)
    rows = [[name, f"{statistics.median(speeds[name]):,.0f}"] for name in NAMES]
    table("samples of a micro-batch", ["", "tokens/s"], rows)
    pairs = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"  apart is {slower:.2f} x slower, the median of pairs ({pairs})", flush=True)
    return {"runs": runs, "ratios": ratios, "slower": slower}
