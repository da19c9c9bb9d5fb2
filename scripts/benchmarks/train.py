"""`bench train`: this project and TRL in turn, each run a process of its own, on the same weights and tokens."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.conditions import table

# The same for both. The project's own defaults, but for a learning rate at which ten steps show in the loss.
SHARED = {"lr": 1e-3, "betas": [0.9, 0.95], "clip": 1.0}
CONTESTANTS = {"project": "benchmarks.fit_project", "trl": "benchmarks.fit_trl"}


def measure(options: Namespace) -> dict[str, Any]:
    contestants = ["project"] if options.no_trl else ["project", "trl"]
    if "trl" in contestants and not find_spec("trl"):
        print("TRL isn't installed, so there is nothing to compare with: pip install -e '.[bench]'")
        contestants.remove("trl")
    fused = any(override.endswith("optimizer.fused=true") for override in options.overrides)
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        shared = SHARED | {"trl_optim": "adamw_torch_fused" if fused else "adamw_torch"}
        settings = {key: value for key, value in vars(options).items() if key != "json"} | shared
        (folder / "options.json").write_text(json.dumps(settings))
        run("benchmarks.prepare", str(folder), threads=options.threads)
        plan = json.loads((folder / "plan.json").read_text())
        variants = [options.only] if options.only else ["unpacked", "packed"]
        return {variant: compare(folder, variant, plan[variant], contestants, options) for variant in variants}


def compare(
    folder: Path, variant: str, plan: dict[str, Any], contestants: list[str], options: Namespace
) -> dict[str, Any]:
    num_tokens = plan["num_tokens"]
    print(
        f"\n{variant}: {len(num_tokens)} steps of about {statistics.mean(num_tokens):,.0f} tokens, of which "
        f"{sum(plan['num_supervised']) / sum(num_tokens):.0%} supervised; vocabulary {options.vocab:,}",
        flush=True,
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for repeat in range(options.repeats):
        for name in contestants:
            out = folder / f"{variant}-{name}-{repeat}.json"
            run(CONTESTANTS[name], str(folder), variant, str(out), threads=options.threads)
            runs[name].append(figures(json.loads(out.read_text()), num_tokens, options.warmup))
            shown = runs[name][-1]
            print(
                f"  {repeat + 1} {name:8}{shown['tokens_per_second']:8,.0f} tokens/s{shown['peak_mb']:8,.0f} MB"
                f"   load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return {"runs": runs, **summary(variant, runs)}


def run(module: str, *arguments: str, threads: int) -> None:
    """A Python module of this folder in a fresh process, which shows its output only if it fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True
    )
    if process.returncode:
        sys.exit(f"{module} failed:\n{process.stdout[-2000:]}{process.stderr[-4000:]}")


def figures(result: dict[str, Any], num_tokens: list[int], warmup: int) -> dict[str, Any]:
    """Speed of the median step after the warm-up; a step takes from the end of the one before it to its own."""
    assert len(result["ends"]) == len(result["losses"]) == len(num_tokens), "a run made other steps than planned"
    seconds = [end - begin for begin, end in pairwise(result["ends"])]
    first = max(warmup, 1)  # the first step has no end before it
    speeds = [tokens / took for tokens, took in zip(num_tokens[first:], seconds[first - 1 :], strict=True)]
    return {
        "tokens_per_second": statistics.median(speeds),
        "peak_mb": result["rss_peak"] / 1e6,
        "before_mb": result["rss_before"] / 1e6,  # interpreter and libraries, before model and data
        "losses": result["losses"],
    }


def summary(variant: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats; ratios pair by pair, then their median."""
    medians = {
        name: {
            key: statistics.median(run[key] for run in each) for key in ("tokens_per_second", "peak_mb", "before_mb")
        }
        for name, each in runs.items()
    }
    rows = [
        [name, f"{m['tokens_per_second']:,.0f}", f"{m['peak_mb']:,.0f}", f"{m['before_mb']:,.0f}"]
        for name, m in medians.items()
    ]
    result: dict[str, Any] = {"medians": medians}
    if "trl" in runs:
        pairs = list(zip(runs["project"], runs["trl"], strict=True))
        ratios = {key: [ours[key] / theirs[key] for ours, theirs in pairs] for key in ("tokens_per_second", "peak_mb")}
        speed, memory = (statistics.median(ratios[key]) for key in ("tokens_per_second", "peak_mb"))
        rows.append(["project / trl", f"{speed:.2f}", f"{memory:.2f}", ""])
        rows += [
            [f"  pair {i + 1}", f"{speed:.2f}", f"{memory:.2f}", ""]
            for i, (speed, memory) in enumerate(zip(ratios["tokens_per_second"], ratios["peak_mb"], strict=True))
        ]
        difference = max(
            abs(a - b) for ours, theirs in pairs for a, b in zip(ours["losses"], theirs["losses"], strict=True)
        )
        result |= {
            "ratios": ratios,
            "speed_ratio": speed,
            "memory_ratio": memory,
            "loss_difference": difference,
        }
    table(f"{variant}, medians", ["", "tokens/s", "peak MB", "of it libraries"], rows)
    losses = runs["project"][0]["losses"]
    print(f"  loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last", end="")
    print(
        f"; the two curves differ by at most {result['loss_difference']:.1e}" if "trl" in runs else "",
        flush=True,
    )
    return result
