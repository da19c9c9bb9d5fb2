"""How fast is it? Rates of the device, then training of models of known shapes, and of TRL's on the same tokens."""

import fcntl
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import shapes
from benchmarks.train import SHARED, figures
from checks.process import Failed, NotRun, Place, only_trace

TOKENS = 16_384  # of a matrix product, and about those of a micro-batch
COPIED = 2**28  # numbers of 4 bytes
LONGEST = 4096  # tokens of a sample
STEPS, WARMUP = 12, 4
# Tokens of a pack, packs of a micro-batch: what 80 GB hold without gradient checkpointing.
PACKS = {"qwen-0.5b": (8192, 2), "qwen-1.5b": (8192, 1), "llama-8b": (4096, 1)}
LORA = {"llama-8b": 16}


def roofline(place: Place) -> tuple[str, dict[str, Any]]:
    """Rates of the matrix products that the shapes are made of, in bf16 on random numbers, and of a copy."""
    import torch

    from sft.model.loss import CHUNK_ELEMENTS

    names = ("qwen-0.5b", "qwen-1.5b", "llama-8b") if place.gpu else ("toy",)
    rates: dict[str, dict[str, float]] = {}
    for name in names:
        shape, num_tokens = shapes.SHAPES[name], TOKENS if place.gpu else 64
        products = {layer: (num_tokens, *sizes) for layer, sizes in shapes.matrices(shape).items()}
        chunk = CHUNK_ELEMENTS[place.device] // shape["vocab_size"]  # of tokens, as the loss takes them
        products["lm_head"] = (min(num_tokens, chunk), shape["hidden_size"], shape["vocab_size"])
        rates[name] = {}
        for layer, (num_tokens, inputs, outputs) in products.items():
            a = torch.randn(num_tokens, inputs, device=place.device, dtype=torch.bfloat16)
            b = torch.randn(outputs, inputs, device=place.device, dtype=torch.bfloat16)
            seconds = median_seconds(place, lambda a=a, b=b: a @ b.T)
            rates[name][layer] = 2 * num_tokens * inputs * outputs / seconds / 1e12
    source = torch.randn(COPIED if place.gpu else 2**16, device=place.device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / median_seconds(place, lambda: target.copy_(source)) / 1e9
    best = {name: max(each.values()) for name, each in rates.items()}
    told = ", ".join(f"{name} {rate:,.3g}" for name, rate in best.items())
    return f"TFLOP/s of the best layer: {told}; copy {copied:,.3g} GB/s", {"tflops": rates, "copy_gb_s": copied}


def median_seconds(place: Place, action: Any, repeats: int = 10) -> float:
    import torch

    times = []
    for _ in range(repeats + 3):
        if place.gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            action()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            action()
            times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def train(place: Place, shape: str, contestant: str = "project", compiled: bool = False) -> tuple[str, dict[str, Any]]:
    """Some steps of packs of samples of up to 4,096 tokens; the speed of the median one."""
    name = f"{shape}-{contestant}{'-compiled' if compiled else ''}"
    folder = place.folder / f"speed-{name}"
    folder.mkdir()
    options = settings(place, shape, compiled)
    if compiled and not place.gpu:
        only_trace()
    if options["weights"]:
        (folder / "model").symlink_to(on_disk(place, shape)[0])
    prepare(folder, options)
    plan = json.loads((folder / "plan.json").read_text())["packed"]
    fit(contestant, folder)
    result = json.loads((folder / "out.json").read_text())
    made = figures(result, plan, options)
    made["losses"] = [made["losses"][0], made["losses"][-1]]
    made["seconds_to_first_step"] = result["ends"][0][0] - result["started"]
    told = f"{made['tokens_per_second']:,.0f} tokens/s, {made['tflops']:,.3g} useful TFLOP/s"
    if place.gpu:
        import torch

        from sft.model import flops

        made["device"] = torch.cuda.get_device_name()
        made["host_gb"] = result["rss_peak"] / 1e9
        made["mfu"] = (peak := flops.peak(made["device"])) and made["tflops"] * 1e12 / peak
        told += f" ({made['mfu']:.1%} MFU)" if made["mfu"] else ""
    told += f", {made['peak_mb'] / 1e3:,.3g} GB, first step after {made['seconds_to_first_step']:.0f} s"
    if contestant == "project":
        made |= {"waits": result.get("waits"), "graphs": result["graphs"]}
        if result.get("waits") is not None:
            told += f", {len(result['waits'])} waits a step"
        if compiled:
            later = result["graphs"][-1] - result["graphs"][WARMUP - 1]
            told += f", {result['graphs'][-1]} graphs, {later} of them after step {WARMUP}"
    return told, made


def settings(place: Place, shape: str, compiled: bool) -> dict[str, Any]:
    """Options of `scripts/bench train`."""
    gpu = place.gpu
    pack, micro = PACKS[shape] if gpu else (128, 1)
    longest = LONGEST if gpu else 40
    mean = 0.42 * longest  # of what is drawn
    return {
        **SHARED,
        "shape": shape if gpu else "toy",
        "gpu": gpu,
        "weights": shape in LORA,  # an adapter lies beside weights that are somewhere
        "lora": LORA.get(shape, 0),
        "precision": "bf16-true" if shape in LORA else "bf16-mixed",
        "checkpointing": False,
        "packs": 2 * micro,
        "micro_packs": micro,
        "max_length": pack,
        "longest": longest,
        "samples": int((STEPS + 1) * 2 * micro * pack / mean),
        "global_batch": 1,
        "micro_batch": 1,
        "variants": ["packed"],
        "warmup": WARMUP,
        "threads": 8 if gpu else 1,
        "seed": 0,
        "overrides": [f"model.compile={str(compiled).lower()}"],
    }


def prepare(folder: Path, options: dict[str, Any]) -> None:
    from benchmarks import prepare

    (folder / "options.json").write_text(json.dumps(options))
    if not options["weights"]:
        prepare.write_model(folder / "model", options)
    prepare.write_tokens(folder, options)


def fit(contestant: str, folder: Path) -> None:
    from importlib import import_module

    import_module(f"benchmarks.fit_{contestant}").main(folder, "packed", folder / "out.json")


# --- a large model on disk ---


def on_disk(place: Place, shape: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a model of this shape with random bf16 weights, written once, and how long that took."""
    models = place.folder / "models"
    models.mkdir(exist_ok=True)
    with (models / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        written = models / f"{shape}.json"
        if not written.exists():
            written.write_text(json.dumps(write_weights(place, shape, models / shape)))
        return models / shape, json.loads(written.read_text())


def write(place: Place, shape: str) -> tuple[str, dict[str, Any]]:
    _, made = on_disk(place, shape)
    return f"{made['bytes'] / 1e9:.3g} GB in {made['seconds']:.1f} s", made


def write_weights(place: Place, shape: str, folder: Path) -> dict[str, Any]:
    """Writes them, a tensor at a time."""
    import torch

    from benchmarks.prepare import write_model
    from sft.export.folder import write_shards

    write_model(folder, settings(place, shape, compiled=False) | {"weights": False})
    layout = weights(folder)
    num_bytes = sum(2 * torch.Size(size).numel() for _, size in layout.values())
    if (free := shutil.disk_usage(folder).free) < 1.2 * num_bytes:
        raise NotRun(f"{folder} has {free / 1e9:.0f} GB of the {1.2 * num_bytes / 1e9:.0f} that it takes")
    torch.manual_seed(0)

    def draw(name: str) -> torch.Tensor:
        size = layout[name][1]
        if len(size) == 1:
            return torch.ones(*size, dtype=torch.bfloat16)
        return (torch.randn(*size, device=place.device, dtype=torch.bfloat16) * 0.02).cpu()

    started = time.perf_counter()
    write_shards(folder, layout, draw, {name: name for name in layout}, "5GB")
    return {"bytes": num_bytes, "seconds": time.perf_counter() - started}


def weights(folder: Path) -> dict[str, Any]:
    """dtype and shape of each weight of the model that a folder's configuration means."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return {name: (torch.bfloat16, list(each.shape)) for name, each in model.named_parameters()}


def load(place: Place, shape: str, strategy: str) -> tuple[str, dict[str, Any]]:
    """Time and memory to the first step of a LoRA run under a strategy that reads weights range by range."""
    from benchmarks.fit import parts
    from benchmarks.fit_project import Clock, overrides
    from benchmarks.ranks import Peak
    from sft.training.metrics import StepMetrics

    folder = place.folder / f"load-{strategy}"
    folder.mkdir()
    options = settings(place, shape, compiled=False)
    (folder / "model").symlink_to(on_disk(place, shape)[0])
    prepare(folder, options)
    setting = json.loads((folder / "plan.json").read_text())["packed"]["data"] | {"max_steps": 2}
    clock = Clock()
    own = [*overrides(folder, options), f"strategy={strategy}"]
    started = time.perf_counter()
    trainer, module, data = parts(folder, own, setting, 1, [StepMetrics(), clock])
    with Peak(every=0.05) as peak:
        trainer.fit(module, data)
    if len(clock.ends) != 2:
        raise Failed(f"{len(clock.ends)} steps instead of 2")
    made = {"seconds_to_first_step": clock.ends[0][0] - started, "host_gb": peak.private / 1e9}
    made["host_gb_with_mapped_files"] = peak.resident / 1e9
    told = f"first step after {made['seconds_to_first_step']:.1f} s, {made['host_gb']:.2g} GB of the host's memory"
    if place.gpu:
        import torch

        made["device_gb"] = torch.cuda.max_memory_allocated() / 1e9
        told += f", {made['device_gb']:.3g} GB of the device's"
    return told, made
