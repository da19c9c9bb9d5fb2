"""Which parameters are trained, and each one's learning rate and weight decay: by its role, and by patterns of names.

A pattern is a glob over a parameter's whole name: `*` stands for anything, dots too (`model.layers.0.*`, `*_norm.*`).
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import TYPE_CHECKING

from sft.errors import UserError

if TYPE_CHECKING:  # settings are checked before torch is imported
    from torch import nn
    from transformers import PreTrainedModel

    Named = tuple[str, nn.Parameter]

# Recurrences of state-space models (arXiv 2312.00752): decay would pull a state's time constants towards 1.
STATE_SPACE = ("A_log", "D", "dt_bias")
NO_DECAY = "_no_weight_decay"  # a parameter's flag, by which a model's author takes decay from it
NORM = re.compile(r"norm\d*$|^ln_?\w*$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """The settings of `parameters` in conf/train.yaml."""

    train: Sequence[str] | None = None  # only these; None: all
    freeze: Sequence[str] | None = None  # all but these
    groups: Sequence[Mapping[str, object]] | None = None  # match, lr, weight_decay; the first that matches counts

    def choose(self, model: "PreTrainedModel") -> None:
        """Freezes what isn't to be trained, and what text doesn't reach; `UserError` for a pattern without a match."""
        from sft.checkpoint.layout import named_trainable
        from sft.model.language_part import freeze_rest

        freeze_rest(model)
        if not self.freezes:
            return
        chosen = dict(named_trainable(model))
        tied = {alias: name for name, alias in _aliases(model)}
        kept = _matching("parameters.train", self.train, chosen, tied) if self.train else set(chosen)
        kept -= _matching("parameters.freeze", self.freeze or (), chosen, tied)
        if not kept:
            raise UserError("parameters.freeze leaves nothing to train: take a pattern out")
        for name, parameter in chosen.items():
            parameter.requires_grad_(name in kept)

    @property
    def freezes(self) -> bool:
        """Whether some weights aren't trained, which the base model keeps."""
        return bool(self.train or self.freeze)


def groups(model: "nn.Module", chosen: Parameters) -> list[tuple[str, dict[str, object]]]:
    """The optimizer's groups, each with what it is called: first what no pattern matches, then a pattern after another;
    of each, what decays before what doesn't. Parameters go in by name, so that a checkpoint can tell whose state it
    holds on any number of ranks."""
    from sft.checkpoint.layout import named_trainable

    rest = dict(named_trainable(model))
    of_patterns: list[tuple[str, dict[str, object]]] = []
    tied = {alias: name for name, alias in _aliases(model)}
    for place, group in enumerate(chosen.groups or ()):
        pattern = str(group["match"])
        names = _matching(f"parameters.groups[{place}].match", [pattern], rest, tied)
        matched = [(name, rest.pop(name)) for name in list(rest) if name in names]
        options = {key: group[key] for key in ("lr", "weight_decay") if group.get(key) is not None}
        whole = [(pattern, {"params": matched})] if "weight_decay" in options else _by_role(model, matched, pattern)
        of_patterns += [(name, {**made, **options}) for name, made in whole]
    return [*_by_role(model, list(rest.items())), *of_patterns]


def rates(model: "nn.Module", chosen: Parameters) -> dict[str, int]:
    """The place of a group that has the learning rate of each pattern of `groups` that sets one."""
    names = [name.removesuffix(" matrices").removesuffix(" vectors") for name, _ in groups(model, chosen)]
    return {str(g["match"]): names.index(str(g["match"])) for g in chosen.groups or () if g.get("lr") is not None}


def _by_role(model: "nn.Module", named: "list[Named]", of: str = "") -> list[tuple[str, dict[str, object]]]:
    """What decays (matrices), and what doesn't (vectors, by role)."""
    kinds: dict[bool, list[Named]] = {True: [], False: []}
    for name, parameter in named:
        kinds[decays(model, name, parameter)].append((name, parameter))
    parts: list[tuple[str, dict[str, object]]] = [
        ("matrices", {"params": kinds[True]}),
        ("vectors", {"params": kinds[False], "weight_decay": 0.0}),
    ]
    return [(f"{of} {kind}".lstrip(), group) for kind, group in parts if group["params"]]


def decays(model: "nn.Module", name: str, parameter: "nn.Parameter") -> bool:
    """Whether weight decay is for a parameter, by its role: not for vectors, nor for what acts like one whatever its
    shape, as experts' biases [experts, channels] or a norm's weights by head, nor where the model's author says so."""
    from sft.checkpoint.layout import full_shape

    owner, _, own = name.rpartition(".")
    module = model.get_submodule(owner)
    is_norm = NORM.search(owner.rpartition(".")[2]) or NORM.search(type(module).__name__)
    return not (
        # Sharded by ZeRO-3 every parameter looks like a vector: ask for its true shape.
        len(full_shape(parameter)) < 2
        or own.endswith("bias")
        or own in STATE_SPACE
        or is_norm
        or getattr(parameter, NO_DECAY, False)
    )


def describe(name: str, group: Mapping[str, object]) -> str:
    """A line on a group of a made optimizer."""
    from sft.checkpoint.layout import full_shape

    parameters: Iterable[nn.Parameter] = group["params"]  # type: ignore[assignment]
    sizes = [prod(full_shape(parameter)) for parameter in parameters]
    rate, decay = group.get("initial_lr", group.get("lr")), group.get("weight_decay", 0.0)
    return f"optimizer: {name}: lr {rate}, weight decay {decay}, {sum(sizes):,} parameters"


def _aliases(model: "nn.Module") -> list[tuple[str, str]]:
    """(name, other name) of parameters that are tied."""
    first: dict[int, str] = {}
    every = [(first.setdefault(id(p), name), name) for name, p in model.named_parameters(remove_duplicate=False)]
    return [(name, alias) for name, alias in every if name != alias]


def _matching(setting: str, patterns: Sequence[str], names: Iterable[str], tied: Mapping[str, str]) -> set[str]:
    """The names that some pattern matches; `UserError` for a pattern that matches none."""
    matched: set[str] = set()
    for pattern in patterns:
        own = fnmatch.filter(names, pattern)
        if not own and (alias := next(iter(fnmatch.filter(tied, pattern)), None)):
            raise UserError(
                f"{setting}: {pattern} means {alias}, which shares its weight with {tied[alias]}: name that, or leave "
                "it out"
            )
        if not own:
            near = ", ".join(_near(pattern, list(names))) or "none, since earlier patterns have them all"
            raise UserError(f"{setting}: {pattern} matches no parameter that is trained; near it are {near}")
        matched |= set(own)
    return matched


def _near(pattern: str, names: list[str]) -> list[str]:
    """Up to three names with a part like the pattern's longest that is like any."""
    parts = {part for name in names for part in name.split(".")}
    for word in sorted(re.split(r"[^\w]+", pattern), key=len, reverse=True):
        if near := get_close_matches(word, parts, n=1):
            return [name for name in names if near[0] in name.split(".")][:3]
    return names[:3]
