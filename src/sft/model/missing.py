"""Weights that a model's files lack: found by their headers, and refused by name, or drawn where they may be new."""

import copy
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from sft.checkpoint.safetensors_file import BY_NAME, read_range
from sft.errors import UserError

NUM_COMPARED = 2**26  # values at once
NUM_NAMED = 3  # weights that a message names; of the others it gives the number
Info = Mapping[str, Any]  # what transformers' loading reports: missing_keys, mismatched_keys, unexpected_keys


def of_files(empty: PreTrainedModel, files: Sequence[str]) -> Info:
    """What transformers reports of loading safetensors files into such a model, by their headers alone.

    It does so itself, on tensors without content: with its conversions, its ties, and what it ignores.
    """
    stored = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no mapping
                values = file.get_slice(key)
                dtype = BY_NAME.get(values.get_dtype(), torch.float32)
                stored[key] = torch.empty(values.get_shape(), dtype=dtype, device="meta")
    loaded: Any
    try:
        with without_report():
            loaded = type(empty).from_pretrained(
                None,
                config=empty.config,
                state_dict=dict(stored),
                dtype=empty.dtype,
                device_map={"": "meta"},
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except RuntimeError:  # a tensor that is joined from several lacks some of them
        meant = revert_weight_conversion(empty, dict(empty.state_dict()))
        if not (missing := [name for name in meant if name not in stored]):
            raise
        return {"missing_keys": missing, "mismatched_keys": [], "unexpected_keys": [*(stored.keys() - meant.keys())]}
    report: Info = loaded[1]
    return report


def check_ties(empty: PreTrainedModel, files: Sequence[str], source: str) -> None:
    """Refuses files that hold two different weights where the configuration says that they are one: transformers would
    train both, and whoever reads the files range by range only one."""
    opened = [safe_open(path, "pt") for path in files]
    file_of = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  it is no mapping
    for name, other in (getattr(empty, "all_tied_weights_keys", None) or {}).items():
        if name not in file_of or other not in file_of:
            continue
        numel = empty.get_parameter(other).numel()
        for start in range(0, numel, NUM_COMPARED):
            stop = min(numel, start + NUM_COMPARED)
            if not torch.equal(*(read_range(file_of[key], key, start, stop) for key in (name, other))):
                raise UserError(
                    f"model.path={source}: its configuration says that {name} is {other}, and its files hold two "
                    "different ones: set model.config.tie_word_embeddings=false to train both, or remove the first"
                )


@contextmanager
def without_report() -> Iterator[None]:
    """Leaves out the table that transformers prints of what it has not loaded: `check` says it in a line."""

    def is_no_report(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "LOAD REPORT" not in message and "checkpoint seem corrupted" not in message

    loggers = [logging.getLogger(f"transformers.{name}") for name in ("modeling_utils", "integrations.peft")]
    for logger in loggers:
        logger.addFilter(is_no_report)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_no_report)


def check(info: Info, model: PreTrainedModel, source: str, new_weights: Sequence[str]) -> list[str]:
    """The names of the weights to be drawn at random. UserError for those that the files lack, or hold in another
    shape, and that no glob pattern of `new_weights` matches; and for a pattern that matches none of the model's."""
    order = {name: number for number, name in enumerate(model.state_dict())}
    for pattern in new_weights:
        if not any(fnmatchcase(name, pattern) for name in order):
            raise UserError(
                f"model.new_weights: {pattern} matches no weight of {type(model).__name__}, whose last is "
                f"{next(reversed(order))}"
            )

    def refused(names: Sequence[str]) -> list[str]:
        unasked = [name for name in names if not any(fnmatchcase(name, pattern) for pattern in new_weights)]
        return sorted(unasked, key=lambda name: order.get(name, len(order)))

    missing, unexpected = refused(info["missing_keys"]), sorted(info["unexpected_keys"])
    if missing:
        others = f"; they hold {_named(unexpected)}, which it has no place for" if unexpected else ""
        tied = ""
        if missing == ["lm_head.weight"] and not model.config.get_text_config().tie_word_embeddings:
            tied = " model.config.tie_word_embeddings=true to use the embeddings as the head, or"
        raise UserError(
            f"model.path={source}: its files lack {_named(missing)} of the model's {len(order)} weights{others}: "
            f"complete them, or set{tied} model.new_weights=['{missing[0]}'] to draw such at random"
        )
    shapes = {name: (list(stored), list(own)) for name, stored, own in info["mismatched_keys"]}
    if mismatched := refused(list(shapes)):
        stored, own = shapes[mismatched[0]]
        raise UserError(
            f"model.path={source}: its files hold {_named(mismatched)} in another shape than its configuration says "
            f"({stored}, not {own}): correct config.json or model.config"
        )
    return [*info["missing_keys"], *shapes]


def _named(names: Sequence[str]) -> str:
    """How many they are, and the first few of them."""
    listed = ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
    return f"{len(names)} ({listed})"


def drawn(empty: PreTrainedModel, name: str) -> Tensor:
    """The value that the model's own initialisation gives a weight, in fp32.

    It depends on its name and on torch's last seed alone, so it is the same on all ranks, however the model is loaded
    and sharded.
    """
    owner, _, own_name = name.rpartition(".")
    module = copy.deepcopy(empty.get_submodule(owner))
    for key, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[key] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="cpu"))
    seed = torch.initial_seed() ^ zlib.crc32(name.encode())
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        empty._init_weights(module)
    return module.get_parameter(own_name).detach()
