"""An architecture, small and with random weights, by the way of a run and by a loop that shares nothing with it.

The loop is the model's own class and attention, one sample at a time, plain cross entropy and `backward`. In fp32 both
must agree in the log-probability of every token and in the gradient of every parameter.
"""

import copy
import inspect
import math
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto import modeling_auto

import settings
from checks.architectures_defaults import PUBLISHED
from checks.numbers import batch_of, gradient
from checks.process import Place
from made_up import OneRank
from sft.checkpoint.layout import named_trainable, persistent_buffers
from sft.data.labels import IGNORE
from sft.errors import UserError
from sft.export.folder import write_model as write_export
from sft.export.merge import completed, weights
from sft.model import sharded_loading
from sft.model.adapter import NAME as ADAPTER
from sft.model.adapter import initial
from sft.model.cause import first_line
from sft.model.first_batch import Prover
from sft.model.found import Proof
from sft.model.isolation import Isolation, use_attention
from sft.model.loading import ModelSource
from sft.model.loss import head_is_plain_matrix, nll, token_log_probs
from sft.proof.excerpt import Excerpt
from sft.proof.shrink import write_model
from sft.training.first_batch import first_samples

PACKED, APART, REFUSED, WRONG, TRACEBACK = "packed", "apart", "refused", "silently wrong", "traceback"
# The largest difference of a token's log-probability; of the gradient ‖a − b‖ / ‖b‖, of all parameters together and of
# the worst one. A parameter whose gradient is less than SMALLEST of the whole is measured by that: the gradient of a
# key's bias is 0 but for roundings.
FORWARD, GRADIENT, WORST, SMALLEST = 1e-4, 1e-4, 1e-3, 1e-2
VOCAB = 267
LENGTHS = (70, 33, 1, 51, 2, 30)  # longer than windows and chunks of the small models

QUICK = (  # one of each kind
    *("llama", "gpt2", "opt", "openai-gpt"),  # dense, and older ones with positions of their own
    *("gemma3_text", "llama4_text", "gemma2"),  # a sliding window, chunks, soft-capped scores
    *("qwen3_moe", "phimoe", "gpt_oss"),  # experts, drawn at random, with attention sinks
    *("deepseek_v3", "deepseek_v32"),  # heads of two widths, sparse attention
    *("bloom", "mpt", "xglm"),  # attention of their own
    *("mamba2", "falcon_h1", "lfm2", "qwen3_5_text"),  # states, with attention, convolutions, linear attention
    *("bart", "bert", "xlnet"),  # half of an encoder-decoder, an encoder as a decoder, no order of tokens
    *("gemma3n_text", "gemma4_text"),  # embeddings for each layer
    *("gemma3", "qwen3_vl"),  # vision-language, with positions of three rows
)

Samples = list[tuple[np.ndarray, np.ndarray]]
Row = dict[str, Any]


def causal() -> dict[str, str]:
    """The class of each causal language model of the installed transformers, by its model type."""
    return dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def vision_language() -> dict[str, str]:
    """The same of those that take images too and that aren't among the causal ones."""
    kinds = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {name: kind for name, kind in kinds.items() if name not in causal()}


def limits() -> str:
    """What the numbers are of, and how large they may be."""
    num_supervised = sum(int((labels != IGNORE).sum()) for _, labels in made_up(VOCAB, []))
    return (
        f"{len(LENGTHS)} samples of 1 to {max(LENGTHS)} tokens, {sum(LENGTHS)} together, {num_supervised} of them "
        "supervised, in one micro-batch, in fp32. A log-probability may differ by "
        f"{FORWARD:g}, the gradient by {GRADIENT:g} of its norm, that of a parameter by itself by {WORST:g}; more is "
        "*silently wrong*. \\* Compared in evaluation mode, since the model draws random numbers in training."
    )


def measure(place: Place, name: str) -> tuple[str, Row]:
    """What becomes of an architecture: a line, and its row of the table."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models' own code
        row = measured(place.folder / "architectures" / name, name, place)
    return told(row), row


def told(row: Row) -> str:
    figures = "".join(f", {part} {row[part]:.0e}" for part in ("forward", "gradient") if part in row)
    return f"{row['kind']}{figures}" + (f": {row['why']}" if row.get("why") else "")


def measured(folder: Path, name: str, place: Place) -> Row:
    if fault := fault_of(lambda: write_small(folder, name)):
        return fault | {"stage": "small form"}
    model = Plain(folder)
    row: Row = {"class": model.kind, "attention": ""}
    own_fault = fault_of(model.run)
    row |= {"draws": model.draws, "reads_ahead": model.reads_ahead}
    source = settings.model_source(path=str(folder))
    ours: list[Any] = []
    if fault := fault_of(lambda: ours.extend(proven(source, model.samples, place, model.draws))):
        return row | fault | {"stage": "first batch"}
    trained, proof = ours
    isolation: Isolation = proof.isolation
    row |= {"kind": APART if isolation.apart else PACKED, "attention": isolation.attention, "why": proof.reason or ""}
    if own_fault:
        return row | {"kind": WRONG, "why": f"trained, though the model's own class can't: {own_fault['why']}"}
    parts: dict[str, Callable[[], Row]] = {
        "main": lambda: compared(trained, isolation, model, place),
        "checkpointing": lambda: checkpointing(source, isolation, model, place),
        "lora": lambda: lora(source, isolation, model, place),
        "zero3": lambda: zero3(source, model),
        "export": lambda: export(source, trained, model),
    }
    for part, function in parts.items():
        found: Row = {}
        fault = fault_of(lambda function=function, found=found: found.update(function()))  # type: ignore[misc]
        row[part] = found | (fault or {})
        if part == "main":
            row |= row.pop(part)
    return row | verdict(row)


def verdict(row: Row) -> Row:
    """What changes the kind that training has found: a fault in any part."""
    if row["kind"] not in (PACKED, APART):
        return {}
    faults = {part: row[part] for part in ("checkpointing", "lora", "zero3", "export") if row[part].get("kind")}
    for kind in (WRONG, TRACEBACK):
        if found := [f"{part}: {fault['why']}" for part, fault in faults.items() if fault["kind"] == kind]:
            return {"kind": kind, "why": "; ".join(found)}
    return {}


def fault_of(function: Callable[[], object]) -> Row | None:
    """How a part ends, where it doesn't end well."""
    try:
        function()
    except UserError as error:
        return {"kind": REFUSED, "why": str(error)}
    except Off as error:
        return {"kind": WRONG, "why": str(error), **error.figures}
    except Exception as error:
        traceback.print_exc()
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = " ".join(str(error).split())[:200]
        return {
            "kind": TRACEBACK,
            "why": f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})",
            "trace": traceback.format_exc().splitlines()[-12:],
        }
    return None


class Off(Exception):
    """Numbers that should agree don't."""

    def __init__(self, message: str, figures: Row | None = None) -> None:
        super().__init__(message)
        self.figures = figures or {}


def write_small(folder: Path, name: str) -> None:
    """A small model of this type, as its configuration's defaults have it, completed where they make no model; BERT and
    the like as decoders."""
    try:
        config = AutoConfig.for_model(name, **PUBLISHED.get(name, {}))
    except Exception as error:  # transformers' own
        raise UserError(f"its configuration has no defaults to make small ({first_line(error)})") from error
    if getattr(config, "is_decoder", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.is_decoder = True
    write_model(folder, config, VOCAB, seed=0)


# --- the plain loop ---


class Plain:
    """The model by its own class, and what the loop finds of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = AutoConfig.from_pretrained(folder)
        self.kind: str = (config.architectures or ["none"])[0]
        self.samples = made_up(config.get_text_config().vocab_size, special_ids(config.to_dict()))
        self.draws, self.reads_ahead = False, 0.0

    def load(self, folder: Path | None = None) -> Any:
        kind: Any = getattr(transformers, self.kind)
        model, info = kind.from_pretrained(folder or self.folder, dtype=torch.float32, output_loading_info=True)
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[what]:
                raise Off(f"{what.replace('_', ' ')} of {self.kind}: {str(sorted(info[what])[0])[:80]}")
        return model.train(not self.draws)

    def run(self) -> None:
        model = self.load()
        with torch.no_grad():
            before = torch.get_rng_state()
            log_probs(model, self.samples[0][0])
            self.draws = not torch.equal(before, torch.get_rng_state())
            model.eval()
            ids = self.samples[0][0]
            half = len(ids) // 2
            other = np.concatenate([ids[:half], ids[: half - 1 : -1]])  # the rest the other way round
            before, after = (log_probs(model, each)[: half - 1] for each in (ids, other))
            self.reads_ahead = float((after - before).abs().max())
        model.train(not self.draws)
        self.log_probs, self.gradient = loop(model, self.samples)


def loop(model: nn.Module, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    """log p of each token after the first of its sample, and the gradient of the sum of −log p over supervised ones."""
    model.zero_grad()
    found = []
    for ids, labels in samples:
        log_prob = log_probs(model, ids)
        if (labels != IGNORE).any():
            (-log_prob[torch.from_numpy(labels[1:]) != IGNORE]).sum().backward()
        found.append(log_prob.detach())
    return torch.cat(found), gradient(model)


def log_probs(model: nn.Module, ids: np.ndarray) -> Tensor:
    """Of one sample, as its model is called by itself. [tokens − 1]"""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    names = inspect.signature(model.forward).parameters
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in names.values())
    inputs = {"input_ids": row} | ({"use_cache": False} if "use_cache" in names or takes_any else {})
    try:
        logits = model(**inputs).logits
    except ValueError as error:  # in training some want to be told that nothing is an image
        asked = [name for name in names if name.endswith("token_type_ids") and name in str(error)]
        if not asked:
            raise
        logits = model(**inputs, **{name: torch.zeros_like(row) for name in asked}).logits
    return -F.cross_entropy(logits[0, :-1].float(), row[0, 1:], reduction="none")


def made_up(vocab: int, special: list[int]) -> Samples:
    """Ordinary tokens; supervised is a part of each sample from its first third on."""
    ordinary = np.setdiff1d(np.arange(vocab), special)
    rng = np.random.default_rng(0)
    samples = []
    for length in LENGTHS:
        ids = rng.choice(ordinary, length).astype(np.int32)
        labels = np.where(rng.random(length) < 0.2, IGNORE, ids).astype(np.int32)
        labels[: rng.integers(1, 1 + math.ceil(length / 3))] = IGNORE
        samples.append((ids, labels))
    return samples


def special_ids(config: Mapping[str, Any]) -> list[int]:
    """The tokens that a configuration and its parts name: images, padding and the like."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += special_ids(value)
        elif "token" in str(name) and isinstance(value, int):
            found.append(value)
    return found


# --- the way of a run ---


def proven(source: ModelSource, samples: Samples, place: Place, draws: bool) -> tuple[Any, Proof]:
    """The model, and how its first samples have found it to be called."""
    model = source.load(torch.float32)
    proof = Prover(
        model,
        first_samples(Excerpt(samples, 0), torch.device(place.device)),
        attention=source.attention,
        isolate=source.isolate,
        plain_head=head_is_plain_matrix(model),
    ).prove()
    use_attention(model, proof.isolation.attention)
    return model.train(not draws), proof


def computed(model: Any, isolation: Isolation, samples: Samples, place: Place) -> tuple[Tensor, dict[str, Tensor]]:
    """As `loop` has it."""
    model.zero_grad()
    plain_head = head_is_plain_matrix(model)
    parts = isolation.parts(batch_of(samples, place))
    torch.stack([nll(model, part, plain_head=plain_head) for part in parts]).sum().backward()
    log_prob = torch.cat([token_log_probs(model, part, plain_head=plain_head) for part in parts])
    first = np.cumsum([0, *(len(ids) for ids, _ in samples)])[:-1]
    return log_prob[np.setdiff1d(np.arange(len(log_prob)), first)], gradient(model)


def compared(trained: Any, isolation: Isolation, model: Plain, place: Place) -> Row:
    if model.reads_ahead > FORWARD:
        raise Off(f"trained, though tokens see later ones, which change their log p by {model.reads_ahead:.0e}")
    return errors(computed(trained, isolation, model.samples, place), (model.log_probs, model.gradient))


def errors(found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]) -> Row:
    """`forward`, `gradient`, `worst` and whose that is; `Off` is raised by one that is larger than it may be."""
    row: Row = {"forward": float((found[0] - exact[0]).abs().max())}
    norms, differences = {}, {}
    for name in exact[1].keys() | found[1].keys():
        ours, theirs = (gradients.get(name, torch.zeros(())).double() for gradients in (found[1], exact[1]))
        norms[name], differences[name] = float(theirs.norm()), float((ours - theirs).norm())
    whole = math.hypot(*norms.values())
    row["gradient"] = math.hypot(*differences.values()) / whole
    of_each = {name: differences[name] / max(norm, SMALLEST * whole) for name, norm in norms.items()}
    worst = max(of_each, key=lambda name: (of_each[name], name))
    row |= {"worst": of_each[worst], "parameter": worst}
    for part, limit in (("forward", FORWARD), ("gradient", GRADIENT), ("worst", WORST)):
        if not row[part] <= limit:  # NaN is within nothing
            what = f"gradient of {worst}" if part == "worst" else part
            raise Off(f"{what} is off by {row[part]:.0e}", row)
    return row


def checkpointing(source: ModelSource, isolation: Isolation, model: Plain, place: Place) -> Row:
    """With gradient checkpointing. A model that draws random numbers in training is compared with itself without."""
    made = [attended(replace(source, gradient_checkpointing=on), isolation) for on in (True, False)]
    exact = model.log_probs, model.gradient
    found = []
    for each in made if model.draws else made[:1]:
        torch.manual_seed(0)
        found.append(computed(each, isolation, model.samples, place))
    return errors(found[0], found[1] if model.draws else exact)


def attended(source: ModelSource, isolation: Isolation) -> Any:
    model = source.load(torch.float32)
    use_attention(model, isolation.attention)
    return model


def lora(source: ModelSource, isolation: Isolation, model: Plain, place: Place) -> Row:
    """Of an adapter's weights alone; the plain loop has the same ones, added to its model by peft alone."""
    from peft import inject_adapter_in_model

    trained = attended(replace(source, adapter=settings.adapter(r=4, alpha=8)), isolation).train(not model.draws)
    drawn = {}
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:  # B is zero at first, and would leave A without a gradient
            drawn[name] = initial(name.replace("lora_B", "lora_A"), parameter.shape)
            parameter.data.copy_(drawn[name])
    plain = inject_adapter_in_model(copy.deepcopy(trained.peft_config[ADAPTER]), model.load())
    if unknown := plain.load_state_dict(drawn, strict=False).unexpected_keys:
        raise Off(f"peft adds no {unknown[0]}")
    log_prob, exact = loop(plain, model.samples)
    own = {name: value for name, value in exact.items() if name in drawn}
    return errors(computed(trained, isolation, model.samples, place), (log_prob, own))


# --- files ---


def zero3(source: ModelSource, model: Plain) -> Row:
    """Weights read as under ZeRO-3, by one rank that gets all of them."""
    by_range, original = [], sharded_loading.weight_reader

    def noted(*arguments: Any) -> Any:
        read = original(*arguments)
        by_range.append(read is not None)
        return read

    with replaced(sharded_loading, "weight_reader", noted):
        found = weights(source.load(torch.float32, sharding=OneRank()))
    exact = weights(model.load())
    row = {"way": "by range" if by_range and all(by_range) else "whole"}
    if differing := [name for name, value in exact.items() if name not in found or not torch.equal(found[name], value)]:
        raise Off(f"{len(differing)} of {len(exact)} weights are others, {differing[0]}", row)
    return row


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def export(source: ModelSource, trained: Any, model: Plain) -> Row:
    """Every trainable weight grows by 1 %, and the exported folder is loaded by the model's own class."""
    exact = model.load()
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
                exact.get_parameter(name).mul_(1.01)
    held = dict([*named_trainable(trained), *persistent_buffers(trained)])
    specs: Any = {name: (value.dtype, list(value.shape)) for name, value in held.items()}
    read: Any = lambda name: held[name].detach()  # noqa: E731
    if source.keeps_base(source.load_config()):
        specs, read = completed(source, specs, read)
    said: list[str] = []
    folder = model.folder.with_name(f"{model.folder.name}-export")
    write_export(folder, source, specs, read, GenerationConfig(), log=said.append)
    row: Row = {"way": "whole" if said else "by weight"}
    reloaded = model.load(folder).eval()
    exact.eval()
    with torch.no_grad():
        differences = [log_probs(reloaded, ids) - log_probs(exact, ids) for ids, _ in model.samples if len(ids) > 1]
    row["forward"] = float(torch.cat(differences).abs().max())
    if not row["forward"] <= FORWARD:
        raise Off(f"the exported model's log-probabilities are off by {row['forward']:.0e}", row)
    return row
