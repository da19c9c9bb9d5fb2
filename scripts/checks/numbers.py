"""Is what the device computes what it should be? Each part against a plain computation that shares nothing with it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import settings
from checks.assets import write_model
from checks.process import Failed, Place, only_trace
from sft.data.batch import Batch, make_batch, to_device
from sft.data.labels import IGNORE
from sft.model import attention as packed
from sft.model import varlen
from sft.model.adapter import initial
from sft.model.loading import ModelSource, decoder_layers
from sft.model.loss import head_is_plain_matrix, linear_nll, nll
from sft.model.visible import visible
from sft.proof.excerpt import Excerpt

# Largest relative error of a vector of numbers, ‖a − b‖ / ‖b‖. In bf16 a rounding is 2^-9 = 0.002 of a number, and some
# follow each other.
EXACT, ROUNDED = 1e-4, 1.5e-2
LOSS = {"32-true": 1e-5, "bf16-mixed": 5e-3, "bf16-true": 5e-3}
GRADIENT = {"32-true": EXACT, "bf16-mixed": 5e-2, "bf16-true": 5e-2}  # 1 to 3 % on a processor


def error(found: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖"""
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    return float((found - exact).norm() / exact.norm())


def within(what: str, value: float, limit: float) -> float:
    if not value <= limit:  # NaN is within nothing
        raise Failed(f"{what} is off by {value:.1e}, more than {limit:.1e}")
    return value


def device(place: Place) -> tuple[str, dict[str, Any]]:
    """What there is, and that a forked process can use it."""
    if not place.gpu:
        return f"torch {torch.__version__} on the processor", {}
    properties = torch.cuda.get_device_properties(0)
    figures = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": properties.total_memory / 1e9,
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "count": torch.cuda.device_count(),
    }
    total = torch.ones(1000, device="cuda").sum().item()
    if total != 1000:
        raise Failed(f"the sum of 1000 ones is {total}")
    named = ("name", "capability", "cuda", "nccl")
    return ", ".join(f"{name} {figures[name]}" for name in named), figures


# --- attention ---

# Query heads, heads of keys and values, width, width of values, lengths of the samples, what else.
LENGTHS = [1, 700, 33, 1314, 2, 512]
ATTENTION = {
    "grouped heads": (14, 2, 64, 64, LENGTHS, {}),
    "width 96": (4, 4, 96, 96, LENGTHS, {}),
    "width 128": (8, 2, 128, 128, LENGTHS, {}),
    "width 256": (4, 1, 256, 256, LENGTHS, {}),
    "width 72": (4, 2, 72, 72, LENGTHS, {}),
    "width 200": (2, 2, 200, 200, LENGTHS, {}),
    "width 192, values 128": (4, 4, 192, 128, LENGTHS, {}),
    "window": (8, 2, 64, 64, LENGTHS, {"window": 128}),
    "chunks": (8, 2, 64, 64, LENGTHS, {"chunk": 256}),
    "sinks": (8, 2, 64, 64, LENGTHS, {"sinks": 1}),
    "sinks, window, width 192, values 128": (4, 4, 192, 128, LENGTHS, {"sinks": 1, "window": 128}),
    "one token": (8, 2, 64, 64, [1], {}),
    "samples of one token": (8, 2, 64, 64, [1] * 64, {}),
    "8 k tokens": (2, 1, 64, 64, [8192], {}),
}


def attention(place: Place) -> tuple[str, dict[str, Any]]:
    """This project's attention against scores written out in fp64 on the processor, forward and backward."""
    figures: dict[str, Any] = {}
    torch.set_num_threads(8 if place.gpu else 1)
    calls = count_calls()
    for name, (heads, groups, width, value_width, lengths, what) in ATTENTION.items():
        if not place.gpu:
            lengths, what = (
                [-(-length // 32) for length in lengths],
                {key: -(-size // 32) for key, size in what.items()},
            )
        figures[name] = one_attention(place, heads, groups, width, value_width, lengths, **what)
    windows = sum("window" in what for *_, what in ATTENTION.values())
    expected = {False: len(ATTENTION) - windows, True: windows * ("window_size" in varlen.KERNEL_OPTIONS)}
    if place.gpu and varlen.varlen_attn is not None and calls != expected:
        raise Failed(f"torch's varlen kernel was called {calls[False]} times and {calls[True]} with a window")
    figures["kernel calls"] = sum(calls.values())
    figures["kernel options"] = sorted(varlen.KERNEL_OPTIONS)
    limit = ROUNDED if place.gpu else EXACT
    for name in ATTENTION:
        for part, value in figures[name].items():
            within(f"{name}: {part}", value, limit)
    worst = {part: max(figures[name][part] for name in ATTENTION) for part in ("out", "gradient")}
    way = f"{figures['kernel calls']} by torch's varlen kernel" if place.gpu else "by sample, in fp32"
    return f"{len(ATTENTION)} shapes, {way}: out {worst['out']:.1e}, gradient {worst['gradient']:.1e}", figures


def count_calls() -> dict[bool, int]:
    """Calls of the kernel from now on, without and with a window."""
    calls, original = {False: 0, True: 0}, varlen.attend

    def counted(*arguments: Any) -> Tensor:
        calls[arguments[6] is not None] += 1
        return original(*arguments)

    varlen.attend = counted  # type: ignore[assignment]
    return calls


def one_attention(
    place: Place,
    heads: int,
    groups: int,
    width: int,
    value_width: int,
    lengths: list[int],
    window: int | None = None,
    chunk: int | None = None,
    sinks: int = 0,
) -> dict[str, float]:
    """Relative errors of the output and of the gradients together."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if place.gpu else torch.float32
    num = sum(lengths)
    shapes = [(1, heads, num, width), (1, groups, num, width), (1, groups, num, value_width)]
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    back = torch.randn(1, num, heads, value_width, generator=generator).to(dtype)
    if sinks:
        drawn.append(torch.randn(heads, generator=generator))
    rows = query, key, value, *sink = [row.clone().to(place.device).requires_grad_() for row in drawn]
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device=place.device)
    options: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths)}
    options["s_aux"] = sink[0] if sinks else None
    out, _ = packed.packed_attention(nn.Module(), query, key, value, visible(window, chunk), **options)
    out.backward(back.to(place.device))
    exact_rows = query, key, value, *sink = [row.double().requires_grad_() for row in drawn]
    exact = written_out(query, key, value, lengths, window, chunk, *sink)
    exact.backward(back.double())
    gradients = [torch.cat([row.grad.flatten().cpu() for row in each]) for each in (rows, exact_rows)]  # type: ignore[union-attr]
    return {"out": error(out, exact), "gradient": error(*gradients)}


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    window: int | None,
    chunk: int | None,
    sink: Tensor | None = None,
) -> Tensor:
    """Attention of each sample and head by itself: scores, mask, softmax, sum. [1, T, H, E]"""
    ratio = query.shape[1] // key.shape[1]
    outs = []
    for start, end in pairwise([0, *np.cumsum(lengths).tolist()]):
        position = torch.arange(end - start)
        distance = position[:, None] - position
        hidden = (distance < 0) | (distance >= (window or end))
        hidden |= position[:, None] // (chunk or end) != position // (chunk or end)
        heads = []
        for head in range(query.shape[1]):
            scores = query[0, head, start:end] @ key[0, head // ratio, start:end].T / math.sqrt(query.shape[-1])
            scores = scores.masked_fill(hidden, -math.inf)
            if sink is not None:
                scores = torch.cat([scores, sink[head].expand(end - start, 1)], dim=1)
            heads.append(scores.softmax(-1)[:, : end - start] @ value[0, head // ratio, start:end])
        outs.append(torch.stack(heads, 1))
    return torch.cat(outs)[None]


# --- loss and gradient of a model ---


def made_up(vocab: int, lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Samples of these lengths, a random part of the end of each supervised."""
    rng = np.random.default_rng(seed)
    pairs = []
    for length in lengths:
        ids = rng.integers(0, vocab, length).astype(np.int32)
        labels = ids.copy()
        labels[: rng.integers(1, length + 1)] = IGNORE
        pairs.append((ids, labels))
    return pairs


def plain(model: nn.Module, samples: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """The sum of −log p over the supervised tokens, one sample at a time by whole logits; leaves gradients behind."""
    total = 0.0
    for ids, labels in samples:
        logits = model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0, :-1]
        target = torch.tensor(labels[1:].astype(np.int64))
        nll = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum")
        nll.backward()
        total += nll.item()
    return total


def gradient(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {name: parameter.grad.float().cpu() for name, parameter in named if parameter.grad is not None}


def together(gradients: dict[str, Tensor], like: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in like])


def packs(place: Place) -> list[int]:
    return [700, 33, 1, 512, 2, 300, 900, 64] if place.gpu else [70, 33, 1, 51, 2, 30]


def batch_of(samples: list[tuple[np.ndarray, np.ndarray]], place: Place) -> Batch:
    return to_device(make_batch(Excerpt(samples, 0), np.arange(len(samples)), 1), torch.device(place.device))


def computed(model: Any, batch: Batch, precision: str, place: Place) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient as in training."""
    model.zero_grad()
    with torch.autocast(place.device, torch.bfloat16) if precision == "bf16-mixed" else nullcontext():
        total = nll(model, batch, plain_head=head_is_plain_matrix(model))
    total.backward()
    return total.item(), gradient(model)


def load(source: ModelSource, precision: str, place: Place) -> Any:
    model: nn.Module = source.load(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    return model.to(place.device)


def compared(place: Place, source: ModelSource, reference: nn.Module, prepare: Any = None) -> tuple[str, dict]:
    """A packed batch in each precision against the plain loop in fp32 on the processor."""
    samples = made_up(267, packs(place))
    expected = plain(reference, samples)
    exact = gradient(reference)
    batch = batch_of(samples, place)
    figures = {}
    for precision in LOSS:
        if precision == "bf16-true" and not source.adapter:
            continue  # is refused
        model = load(source, precision, place)
        if prepare:
            prepare(model)
        loss, found = computed(model, batch, precision, place)
        assert found.keys() == exact.keys()
        figures[precision] = {
            "loss": within(f"{precision}: loss", abs(loss / expected - 1), LOSS[precision]),
            "gradient": within(
                f"{precision}: gradient", error(together(found, exact), together(exact, exact)), GRADIENT[precision]
            ),
        }
    told = "; ".join(f"{name}: {each['loss']:.1e}, {each['gradient']:.1e}" for name, each in figures.items())
    return f"loss and gradient of {len(samples)} samples in a row, {told}", figures


def objective(place: Place) -> tuple[str, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    folder = write_model(place.folder / "objective")
    return compared(
        place,
        settings.model_source(path=str(folder)),
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )


def lora(place: Place) -> tuple[str, dict[str, Any]]:
    from peft import inject_adapter_in_model
    from transformers import AutoModelForCausalLM

    folder = write_model(place.folder / "lora")
    adapter = settings.adapter(r=5, alpha=10)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inject_adapter_in_model(adapter.lora_config(), reference)

    def draw(model: nn.Module) -> None:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:  # B is zero at first, and would leave A without a gradient
                parameter.data.copy_(initial(name.replace("lora_B", "lora_A"), parameter.shape))

    draw(reference)
    return compared(place, settings.model_source(path=str(folder), adapter=adapter), reference, draw)


def checkpointing(place: Place) -> tuple[str, dict[str, Any]]:
    """Gradient checkpointing and activation offload change no bit, where kernels are deterministic."""
    from torch.autograd.graph import save_on_cpu

    torch.use_deterministic_algorithms(True)
    folder = write_model(place.folder / "checkpointing")
    batch = batch_of(made_up(267, packs(place)), place)
    made, figures = {}, {}
    for name, on, offload in (("plain", False, False), ("checkpointing", True, False), ("offload", False, True)):
        model = load(settings.model_source(path=str(folder), gradient_checkpointing=on), "bf16-mixed", place)
        with peak_memory(place) as memory, save_on_cpu(pin_memory=place.gpu) if offload else nullcontext():
            made[name] = computed(model, batch, "bf16-mixed", place)
        figures[name] = {"peak_mb": memory["mb"]}
    for name, (loss, found) in made.items():
        differing = [each for each, value in found.items() if not torch.equal(value, made["plain"][1][each])]
        if differing or loss != made["plain"][0]:
            raise Failed(f"{name} changes {len(differing)} of {len(found)} gradients, {', '.join(differing[:3])}")
    again = computed(model, batch, "bf16-mixed", place)
    if again[0] != loss or any(not torch.equal(value, again[1][each]) for each, value in found.items()):
        raise Failed("the same batch gives other bits the second time")
    memory_told = ", ".join(f"{name} {each['peak_mb']:.0f} MB" for name, each in figures.items())
    return "the same bits plain, with checkpointing, with offload" + (f"; {memory_told}" if place.gpu else ""), figures


@contextmanager
def peak_memory(place: Place) -> Iterator[dict[str, float]]:
    """MB by which the device's memory in use grows at most."""
    memory = {"mb": 0.0}
    if place.gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    yield memory
    if place.gpu:
        memory["mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6


def compiled(place: Place) -> tuple[str, dict[str, Any]]:
    """model.compile changes no more than roundings, and makes few graphs."""
    import time

    if not place.gpu:
        only_trace()
    folder = write_model(place.folder / "compiled")
    model, other = (
        load(settings.model_source(path=str(folder), compile=on), "bf16-mixed", place) for on in (False, True)
    )
    counters = torch._dynamo.utils.counters
    worst, graphs, seconds = 0.0, [], []
    for seed in range(6):
        lengths = packs(place)[seed % 3 :]
        batch = batch_of(made_up(267, lengths, seed), place)
        exact = computed(model, batch, "bf16-mixed", place)
        started = time.perf_counter()
        found = computed(other, batch, "bf16-mixed", place)
        seconds.append(time.perf_counter() - started)
        graphs.append(counters["stats"]["unique_graphs"])
        within("loss", abs(found[0] / exact[0] - 1), LOSS["bf16-mixed"])
        worst = max(worst, error(together(found[1], exact[1]), together(exact[1], exact[1])))
    within("gradient", worst, GRADIENT["bf16-mixed"])
    breaks = sum(counters["graph_break"].values())
    figures = {"gradient": worst, "graphs": graphs, "graph_breaks": breaks, "first_seconds": seconds[0]}
    if varlen.varlen_attn is not None and (breaks or graphs[-1] > graphs[1]):
        raise Failed(f"{breaks} graph breaks, and graphs after each pack {graphs}: it compiles anew for packs")
    layers = len(decoder_layers(other))
    return f"gradient {worst:.1e}; {graphs[-1]} graphs for {layers} layers, compiled in {seconds[0]:.0f} s", figures


# --- the head ---


def head(place: Place) -> tuple[str, dict[str, Any]]:
    """The loss in chunks over 152 k tokens of vocabulary against whole logits in fp64."""
    num, hidden, vocab = (2500, 896, 152_000) if place.gpu else (120, 16, 152_000)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(num, hidden, generator=generator)
    weight = torch.randn(vocab, hidden, generator=generator) / math.sqrt(hidden) * 2
    target = torch.randint(0, vocab, (num,), generator=generator)
    expected, exact = by_whole_logits(rows, weight, target, place)
    figures = {}
    for dtype, limits in ((torch.float32, (1e-5, EXACT)), (torch.bfloat16, (5e-3, ROUNDED))):
        leaves = [each.clone().to(place.device, dtype).requires_grad_() for each in (rows, weight)]
        with peak_memory(place) as memory:
            nll = linear_nll(leaves[0], leaves[1], target.to(place.device))
            nll.backward()
        name = str(dtype).removeprefix("torch.")
        found = [error(leaf.grad, grad) for leaf, grad in zip(leaves, exact, strict=True)]  # type: ignore[arg-type]
        figures[name] = {"loss": abs(nll.item() / expected - 1), "gradient": max(found), "peak_mb": memory["mb"]}
        within(f"{name}: loss", figures[name]["loss"], limits[0])
        within(f"{name}: gradient", figures[name]["gradient"], limits[1])
    whole_mb = num * vocab * 4 / 1e6
    told = "; ".join(f"{name}: {each['loss']:.1e}, {each['gradient']:.1e}" for name, each in figures.items())
    memory_told = f"; {figures['bfloat16']['peak_mb']:.0f} MB, whole logits {whole_mb:.0f}" if place.gpu else ""
    return f"loss and gradient of {num} tokens, {told}{memory_told}", figures | {"whole_logits_mb": whole_mb}


def by_whole_logits(rows: Tensor, weight: Tensor, target: Tensor, place: Place) -> tuple[float, list[Tensor]]:
    leaves = [each.to(place.device).double().requires_grad_() for each in (rows, weight)]
    total = 0.0
    for some, right in zip(leaves[0].split(250), target.to(place.device).split(250), strict=True):
        nll = F.cross_entropy(some @ leaves[1].T, right, reduction="sum")
        nll.backward()
        total += nll.item()
    return total, [leaf.grad for leaf in leaves]  # type: ignore[misc]
