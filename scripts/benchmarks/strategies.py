"""`bench strategies`: speed, memory and traffic of each rank under each strategy, beside what the formulas say."""

import os
import statistics
import tempfile
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks import ranks
from benchmarks.conditions import table


def measure(options: Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        (model,) = ranks.run("benchmarks.prepare_rank", folder, 1, settings)
        print(
            f"\nLlama of {model['weights'] / 1e6:.1f} M weights, {options.ranks} ranks; steps of "
            f"{options.global_batch} samples of {options.max_length} tokens, one a micro-batch",
            flush=True,
        )
        results = {}
        for name in options.only:
            num_ranks = 1 if name == "single" else options.ranks
            arguments = ("benchmarks.fit_rank", folder, num_ranks, name)
            run = ranks.run(*arguments, settings, False)
            frugal = run if options.quick else ranks.run(*arguments, settings | {"steps": 2}, True)
            peak = max(rank["peak"] for rank in frugal)
            results[name] = {"ranks": num_ranks, "peak_bytes": peak} | figures(run, options.warmup)
            print(f"  {name:16}{results[name]['tokens_per_second']:8,.0f} tokens/s   load {os.getloadavg()[0]:.1f}")
    bf16 = run[0]["cuda"]  # conf/trainer/gpu.yaml computes in bf16, conf/trainer/cpu.yaml in fp32
    show(results, model, options, bf16)
    return {"model": model, "strategies": results}


def figures(run: list[dict[str, Any]], warmup: int) -> dict[str, float]:
    """Of the median step after the warm-up: the seconds of the slowest rank, the work of all of them, what one sends on
    average."""
    steps = [list(pairwise(rank["ends"]))[warmup - 1 :] for rank in run]
    seconds, work, sent = ([[end[field] - begin[field] for begin, end in each] for each in steps] for field in range(3))
    tokens = run[0]["num_tokens"][warmup:]
    return {
        "tokens_per_second": statistics.median(n / max(each) for n, *each in zip(tokens, *seconds, strict=True)),
        # Depends much less on what else the machine does: a check of the figure above.
        "tokens_per_cpu_second": statistics.median(n / sum(each) for n, *each in zip(tokens, *work, strict=True)),
        "bytes_sent": statistics.median(sum(each) / len(each) for each in zip(*sent, strict=True)),
    }


def show(results: dict[str, Any], model: dict[str, int], options: Namespace, bf16: bool) -> None:
    whole = 4 * model["weights"]
    rows = []
    for name, result in results.items():
        d = result["ranks"]
        micro_batches = options.global_batch // d
        states = state_bytes(name, model["weights"], model["largest_layer"], d, bf16)
        row = [name, *(f"{result[key]:,.0f}" for key in ("tokens_per_second", "tokens_per_cpu_second"))]
        row += [f"{result['peak_bytes'] / 1e6:,.0f}", f"{states / 1e6:,.0f}"]
        if not bf16:
            shares = [volume(name, d, micro_batches, scatter) for scatter in ((d - 1) / d, 2 * (d - 1) / d)]
            row += [f"{share:.2f} M" for share in (result["bytes_sent"] / whole, *shares)]
        rows.append(row)
    header = ["", "tokens/s", "tokens/CPU-s", "peak MB", "states MB"]
    header += [] if bf16 else ["sent", "formula", "over gloo"]
    table("each rank, in the median step", header, rows)
    print(
        "  states  weights, gradients and optimizer by the formulas; the peak holds activations and buffers as well\n"
        "  sent    a step, M being the bytes of the model; gloo has no reduce-scatter and sends an all-reduce for it",
        flush=True,
    )


def state_bytes(strategy: str, n: int, layer: int, d: int, bf16: bool) -> float:
    """Bytes of weights, gradients and AdamW's states of a rank; `n` weights, `layer` of them in the largest layer.

    DeepSpeed's own estimates (estimate_zero2_model_states_mem_needs and so on) suppose 2 bytes of each weight and
    gradient in 16 bits: 2n + 18n/d of stage 2, 4 layer + 18n/d of stage 3. In fp32 each such 2 is a 4.
    """
    low = 2 if bf16 else 4
    sharded = 16 + low  # gradients in either precision, fp32 weights, two states
    match strategy:
        case "deepspeed_zero1":
            return 2 * low * n + 16 * n / d
        case "deepspeed_zero2":
            return low * n + sharded * n / d
        case "deepspeed_zero3":
            return 2 * low * layer + sharded * n / d
        case "fsdp2":
            return 2 * low * layer + 16 * n / d
        case _:
            return 16 * n


def volume(strategy: str, d: int, micro_batches: int, scatter: float) -> float:
    """What a rank sends a step, in models: rings, where a gather is (d − 1)/d, an all-reduce twice that, and a
    reduce-scatter `scatter`."""
    gather = (d - 1) / d
    match strategy:
        case "single":
            return 0.0
        case "deepspeed_zero1":
            return scatter + gather
        case "deepspeed_zero2":
            return micro_batches * scatter + gather
        case "deepspeed_zero3" | "fsdp2":
            return micro_batches * (2 * gather + scatter)
        case _:
            return 2 * gather
