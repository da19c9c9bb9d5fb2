"""What a model computes of a few samples, in log-probabilities and gradients, without a trace in it or its strategy.

Gradients are asked for by `torch.autograd.grad`: no parameter gets one, so nothing that a strategy has hung on them
(DDP's buckets, DeepSpeed's and FSDP2's reductions) takes notice. A strategy that gathers weights gives each module its
whole parameters for the time that it runs, which is when they are noted here.

Shape suffixes: B rows, L tokens of a row, T tokens of all of them, C hidden channels, V vocabulary.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.checkpoint.layout import full_shape
from sft.data.batch import Batch
from sft.data.labels import IGNORE
from sft.model import noise
from sft.model.inputs import model_inputs
from sft.model.isolation import configs
from sft.model.loading import decoder_layers

LARGEST = 2**24  # elements of a parameter whose gradient is looked at
EMBEDDINGS = "embeddings"  # what the gradient by the embedded tokens is called among those by parameters

DRAWN = re.compile(r"dropout|pdrop|layer_?drop|drop_?path|jitter_noise")  # names of what random numbers are drawn for

Pass = Callable[[], Tensor]  # makes log p of each token given those before it, float32, 0 at first ones


@dataclass(frozen=True)
class Measured:
    """Of one pass or several."""

    log_probs: Tensor  # float64 [T], on the host
    grads: Mapping[str, Tensor]  # of the sum of -log p: by the embedded tokens [T, C], by parameters; float32

    def __add__(self, other: "Measured") -> "Measured":
        """Of both, one after the other."""
        names = (self.grads.keys() & other.grads.keys()) - {EMBEDDINGS}
        grads = {name: self.grads[name] + other.grads[name] for name in names}
        grads[EMBEDDINGS] = torch.cat([self.grads[EMBEDDINGS], other.grads[EMBEDDINGS]])
        return Measured(torch.cat([self.log_probs, other.log_probs]), grads)


def measured(model: PreTrainedModel, run: Pass, scale: float = 1.0) -> Measured:
    """Log-probabilities and gradients of a pass, the latter times `scale`."""
    with noted(model) as tensors:
        log_prob_T = run()
        names = list(tensors)
        grads = torch.autograd.grad(-log_prob_T.sum(), [tensors[name] for name in names], allow_unused=True)
        wholes = [
            torch.zeros_like(tensors[name]) if grad is None else grad for name, grad in zip(names, grads, strict=True)
        ]
    found = {name: whole.detach().float() * scale for name, whole in zip(names, wholes, strict=True)}
    found[EMBEDDINGS] = found[EMBEDDINGS].flatten(0, -2)
    return Measured(log_prob_T.detach().double().flatten().cpu(), found)


def reach(model: PreTrainedModel, run: Pass, start: int, end: int) -> Tensor:
    """How much each token matters to log p of the tokens `start` to `end`, [T]: its embedding's largest gradient."""
    with noted(model) as tensors:
        total = run().flatten()[start:end].sum()
        (grad,) = torch.autograd.grad(total, [tensors[EMBEDDINGS]])
    return grad.detach().float().flatten(0, -2).abs().amax(-1).cpu()


@torch.no_grad()
def log_probs(run: Pass) -> Tensor:
    """float64 [T], on the host."""
    return run().double().flatten().cpu()


def rows_pass(model: PreTrainedModel, batch: Batch, rows_BL: Tensor) -> Tensor:
    """Log-probabilities [B, L] of a batch of rows without padding, each of them a sample as long as that of `batch`, by
    the model's own logits: as its authors have it."""
    num_rows = len(rows_BL)
    inputs = {
        name: value.expand(num_rows, *value.shape[1:])
        if isinstance(value, Tensor) and value.shape[:2] == batch["input_ids"].shape
        else value
        for name, value in model_inputs(model, batch).items()
    }
    logits_BLV = model(**(inputs | {"input_ids": rows_BL})).logits
    log_prob_BL = logits_BLV[:, :-1].float().log_softmax(-1).gather(2, rows_BL[:, 1:, None])[..., 0]
    return torch.cat([log_prob_BL.new_zeros(num_rows, 1), log_prob_BL], dim=1)


def flat(samples: Sequence[Tensor]) -> Batch:
    """Samples, each its tokens int64 [length], end to end; all of them are supervised but first ones."""
    ids, lengths = torch.cat(list(samples)), [len(sample) for sample in samples]
    position_T = torch.cat([torch.arange(length) for length in lengths]).to(ids.device)
    labels = ids.masked_fill(position_T == 0, IGNORE)
    return {
        "input_ids": ids[None],
        "labels": labels[None],
        "position_ids": position_T[None],
        "predicting": (labels[1:] != IGNORE).nonzero()[:, 0],
        "weights": None,
        "cu_seqlens": torch.tensor([0, *lengths], device=ids.device).cumsum(0).int(),
        "max_seqlen": max(lengths),
        "step_weight": 1.0,
        "num_tokens": len(ids),
        "counts": np.array([[length, length - 1, 0] for length in lengths]),
    }


def long_rows(samples: Sequence[Tensor], num_tokens: int, longest: int) -> tuple[Batch, Batch] | tuple[None, None]:
    """Two rows of `num_tokens` tokens, the same in both, that end in `samples`: before those, all are one of at most
    `longest` and more of the same length; then the first is cut into short ones, and the row still taken for one with a
    long sample. None where `samples` leave no place for a longer one."""
    ids, short = torch.cat(list(samples)), max(map(len, samples))
    rest = num_tokens - len(ids)
    first = min(rest, longest)
    if first <= short:
        return None, None
    fill = ids.repeat(rest // len(ids) + 1)[:rest]
    begun, more = fill[:first], fill[first:].split(first)
    row, cut = flat([begun, *more, *samples]), flat([*begun.split(short), *more, *samples])
    cut["max_seqlen"] = row["max_seqlen"]  # kernels are chosen by it
    return row, cut


@contextmanager
def noted(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """The tensors that a forward pass within it computes with: the embedded tokens, and the trained parameters of a few
    layers (`looked_at`), by name."""
    tensors: dict[str, Tensor] = {}

    def embedded(module: nn.Module, inputs: object, output: Tensor) -> None:
        if torch.is_grad_enabled() and EMBEDDINGS not in tensors:
            # Frozen ones, beside an adapter, have no gradient of their own.
            tensors[EMBEDDINGS] = output if output.requires_grad else output.requires_grad_()

    def note(names: Mapping[str, str], module: nn.Module, inputs: object) -> None:
        for own, name in names.items():
            parameter = module._parameters[own]
            if parameter is not None and parameter.requires_grad:
                tensors.setdefault(name, parameter)

    owners = looked_at(model)
    hooks = [model.get_input_embeddings().register_forward_hook(embedded)]
    hooks += [module.register_forward_pre_hook(partial(note, names)) for module, names in owners]
    try:
        yield tensors
    finally:
        for hook in hooks:
            hook.remove()


def looked_at(model: PreTrainedModel) -> list[tuple[nn.Module, dict[str, str]]]:
    """Modules with the trained parameters, {name within it: name}, of the first and the last layer, and of the first of
    each kind where the configuration says of which kind each is."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    within = {id(module) for module in (decoder or model).modules()}
    layers = [layer for layer in decoder_layers(model) if id(layer) in within]
    if not layers:
        lists = [module for module in (decoder or model).modules() if isinstance(module, nn.ModuleList)]
        layers = list(lists[0]) if lists else []
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or []
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)] if len(kinds) == len(layers) else []
    chosen = {id(layer): layer for layer in [*layers[:1], *(layers[place] for place in firsts), *layers[-1:]]}
    name_of = {id(module): name for name, module in model.named_modules()}
    owners: dict[int, tuple[nn.Module, dict[str, str]]] = {}
    for layer in chosen.values():
        for module in layer.modules():
            names = {
                own: f"{name_of[id(module)]}.{own}"
                for own, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad and prod(full_shape(parameter)) <= LARGEST
            }
            if names:
                owners[id(module)] = module, names
    return list(owners.values())


@contextmanager
def without_noise(model: PreTrainedModel) -> Iterator[None]:
    """While it lasts the model draws no dropout, jitter or noise, in training mode as well, and torch's streams are
    those of a seed; afterwards all is as it was."""
    places = [*map(vars, model.modules()), *map(vars, configs(model))]
    drops = [vars(module) for module in model.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    before = [(place, "p", place["p"]) for place in drops]
    before += [
        (p, name, value) for p in places for name, value in p.items() if isinstance(value, float) and DRAWN.search(name)
    ]
    key_T, noise.TOKENS.key_T = noise.TOKENS.key_T, None
    for place, name, _ in before:
        place[name] = 0.0
    try:
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
            torch.manual_seed(0)
            yield
    finally:
        noise.TOKENS.key_T = key_T
        for place, name, value in before:
            place[name] = value
