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
from benchmarks.shapes import fields

# The same for both. The project's own defaults, but for a learning rate at which ten steps show in the loss.
SHARED = {"lr": 1e-3, "betas": [0.9, 0.95], "clip": 1.0}
COMPARED = ("tokens_per_second", "tokens_per_cpu_second", "tflops", "peak_mb")
PACKED = {"packs": 2, "micro_packs": 1}  # a step; of 2048 tokens about as much as 16 samples
CONTESTANTS = {"project": "benchmarks.fit_project", "trl": "benchmarks.fit_trl"}


def measure(options: Namespace) -> dict[str, Any]:
    contestants = ["project"] if options.no_trl else ["project", "trl"]
    if "trl" in contestants and not find_spec("trl"):
        print("TRL isn't installed, so there is nothing to compare with: pip install -e '.[bench]'")
        contestants.remove("trl")
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        settings = {key: value for key, value in vars(options).items() if key != "json"} | SHARED | PACKED
        settings["variants"] = [options.only] if options.only else ["unpacked", "packed"]
        settings["weights"] = not options.gpu  # the same in both, for curves that can be compared
        (folder / "options.json").write_text(json.dumps(settings))
        run("benchmarks.prepare", str(folder), options=options)
        plan = json.loads((folder / "plan.json").read_text())
        return {variant: compare(folder, variant, plan[variant], contestants, options) for variant in plan}


def compare(
    folder: Path, variant: str, plan: dict[str, Any], contestants: list[str], options: Namespace
) -> dict[str, Any]:
    num_tokens, vocab = plan["num_tokens"], fields(vars(options))["vocab_size"]
    if len(num_tokens) <= max(options.warmup, 1):
        sys.exit(f"{variant}: {len(num_tokens)} steps leave none to measure after the warm-up: give more --samples")
    print(
        f"\n{variant}: {len(num_tokens)} steps of about {statistics.mean(num_tokens):,.0f} tokens, of which "
        f"{sum(plan['num_supervised']) / sum(num_tokens):.0%} supervised; vocabulary {vocab:,}",
        flush=True,
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contestants}
    for repeat in range(options.repeats):
        for name in contestants:
            out = folder / f"{variant}-{name}-{repeat}.json"
            run(CONTESTANTS[name], str(folder), variant, str(out), options=options)
            runs[name].append(figures(json.loads(out.read_text()), plan, vars(options)))
            shown = runs[name][-1]
            print(
                f"  {repeat + 1} {name:8}{shown['tokens_per_second']:8,.0f} tokens/s{shown['peak_mb']:8,.0f} MB"
                f"   load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return {"runs": runs, **summary(variant, runs)}


def run(module: str, *arguments: str, options: Namespace) -> None:
    """A Python module of this folder in a fresh process, which shows its output only if it fails."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
    if not options.gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True
    )
    if process.returncode:
        sys.exit(f"{module} failed:\n{process.stdout[-2000:]}{process.stderr[-4000:]}")


def figures(result: dict[str, Any], plan: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Speed of the median step after the warm-up; a step takes from the end of the one before it to its own."""
    num_tokens = plan["num_tokens"]
    assert len(result["ends"]) == len(result["losses"]) == len(num_tokens), "a run made other steps than planned"
    first = max(options["warmup"], 1)  # the first step has no end before it
    steps = list(zip(num_tokens[first:], list(pairwise(result["ends"]))[first - 1 :], strict=True))
    useful = zip(plan["flops"][first:], steps, strict=True)
    return {
        "tokens_per_second": statistics.median(tokens / (end[0] - begin[0]) for tokens, (begin, end) in steps),
        # Depends much less on what else the machine does: a check of the figure above.
        "tokens_per_cpu_second": statistics.median(tokens / (end[1] - begin[1]) for tokens, (begin, end) in steps),
        "tflops": statistics.median(each / (end[0] - begin[0]) for each, (_, (begin, end)) in useful) / 1e12,
        "peak_mb": result.get("cuda_peak", result["rss_peak"]) / 1e6,
        "before_mb": result["rss_before"] / 1e6,  # interpreter and libraries, before model and data
        "losses": result["losses"],
    }


def summary(variant: str, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians over the repeats; ratios pair by pair, then their median."""
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in (*COMPARED, "before_mb")}
        for name, each in runs.items()
    }
    rows = [
        [name, *(f"{value:,.{3 if key == 'tflops' else 0}f}" for key, value in each.items())]
        for name, each in medians.items()
    ]
    result: dict[str, Any] = {"medians": medians}
    if "trl" in runs:
        pairs = list(zip(runs["project"], runs["trl"], strict=True))
        ratios = {key: [ours[key] / theirs[key] for ours, theirs in pairs] for key in COMPARED}
        result |= {"ratios": ratios, "median_ratios": {key: statistics.median(ratios[key]) for key in COMPARED}}
        rows.append(["project / trl", *(f"{ratio:.2f}" for ratio in result["median_ratios"].values()), ""])
        for i, each in enumerate(zip(*ratios.values(), strict=True)):
            rows.append([f"  pair {i + 1}", *(f"{ratio:.2f}" for ratio in each), ""])
        result["loss_difference"] = max(
            abs(a - b) for ours, theirs in pairs for a, b in zip(ours["losses"], theirs["losses"], strict=True)
        )
    table(f"{variant}, medians", ["", "tokens/s", "tokens/CPU-s", "useful TFLOP/s", "peak MB", "of it libraries"], rows)
    losses = runs["project"][0]["losses"]
    print(f"  loss {losses[0]:.4f} at the first step, {losses[-1]:.4f} at the last", end="")
    print(
        f"; the two curves differ by at most {result['loss_difference']:.1e}" if "trl" in runs else "",
        flush=True,
    )
    return result
