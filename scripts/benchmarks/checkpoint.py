"""`bench checkpoint`: loading, saving and restoring on several ranks, beside the stock ways of doing it."""

import os
import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.conditions import table

# What DeepSpeed's engine does, which leaves writing to the disk to the system.
ENGINE = ["engine save", "engine flush"], ["engine restore"]
Rounds = list[list[dict[str, float]]]  # of each rank, of each round


def measure(options: Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    runs: dict[str, dict[str, dict[str, Rounds]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        (model,) = ranks.run("benchmarks.prepare_rank", folder, 1, settings)
        print(f"\nLlama of {model['weights'] / 1e6:.1f} M weights in fp32, {options.ranks} ranks", flush=True)
        for strategy, ways in {
            "deepspeed_zero3": ("project", "stock"),
            "fsdp2": ("project", "stock"),
            "deepspeed_zero2": ("project",),
        }.items():
            runs[strategy] = {}
            for way in ways:
                run = ranks.run("benchmarks.checkpoint_rank", folder, options.ranks, strategy, way, settings)
                runs[strategy][way] = {name: [rank[name] for rank in run] for name in run[0]}
                print(f"  {strategy}, {way}   load {os.getloadavg()[0]:.1f}", flush=True)
    show_loading(runs, model, options.ranks)
    show_saving(runs)
    return {"model": model, "runs": runs}


def median(rounds: Rounds, field: str) -> float:
    """Over the rounds, of the rank that needs most."""
    return statistics.median(max(rank[field] for rank in each) for each in zip(*rounds, strict=True))


def show_loading(runs: dict[str, dict[str, dict[str, Rounds]]], model: dict[str, int], num_ranks: int) -> None:
    rows = []
    for strategy in ("deepspeed_zero3", "fsdp2"):
        for way, run in runs[strategy].items():
            private, resident = (f"{median(run['load'], field) / 1e6:,.0f}" for field in ("private", "resident"))
            rows.append([f"{strategy}, {way}", private, resident, f"{median(run['load'], 'seconds'):.1f}"])
    table("loading, the rank that needs most", ["", "peak MB", "with mapped files", "seconds"], rows)
    share, tensor = 4 * model["weights"] / num_ranks / 1e6, 4 * model["largest_tensor"] / 1e6
    print(f"  a rank's share + 2 x the largest tensor: {share:,.0f} + 2 x {tensor:,.0f} = {share + 2 * tensor:,.0f} MB")


def show_saving(runs: dict[str, dict[str, dict[str, Rounds]]]) -> None:
    rows = []
    for strategy in ("deepspeed_zero2", "deepspeed_zero3", "fsdp2"):
        run = runs[strategy]["project"]
        for who, save, restore in (("project", ["save"], ["verify", "restore"]), ("engine", *ENGINE)):
            if save[0] in run:
                seconds = [sum(median(run[name], "seconds") for name in names) for names in (save, restore)]
                peaks = [max(median(run[name], "private") for name in names) / 1e6 for names in (save, restore)]
                size = median(run[restore[-1]], "files") / 1e6
                rows.append([f"{strategy}, {who}", f"{size:,.0f}"])
                rows[-1] += [f"{seconds[0]:.1f}", f"{peaks[0]:,.1f}", f"{seconds[1]:.1f}", f"{peaks[1]:,.1f}"]
    header = ["", "MB on disk", "save, s", "peak MB more", "restore, s", "peak MB more"]
    table("saving and restoring weights and optimizer", header, rows)
    ratios = [
        f"{strategy} {statistics.median(ratio):.2f} ({', '.join(f'{each:.2f}' for each in ratio)})"
        for strategy in ("deepspeed_zero2", "deepspeed_zero3")
        if (ratio := pairs(runs[strategy]["project"]))
    ]
    print(f"  project / engine, time of a save until it is on the disk: {'; '.join(ratios)}", flush=True)


def pairs(run: dict[str, Rounds]) -> list[float]:
    """Of each round, the project's time over the engine's."""
    seconds = {
        name: [max(rank["seconds"] for rank in each) for each in zip(*run[name], strict=True)]
        for name in ("save", *ENGINE[0])
    }
    return [own / sum(theirs) for own, *theirs in zip(*seconds.values(), strict=True)]
