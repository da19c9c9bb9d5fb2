"""What callbacks keep, as JSON and safetensors: a reader runs no code, as that of a pickle may.

callbacks.json         numbers, texts, lists and mappings as they are; whatever JSON has no form for is
                       {"": KIND, "value": ...}
callbacks.safetensors  the tensors, each named by its number
"""

import base64
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from sft.errors import UserError

NAMES = ("callbacks.json", "callbacks.safetensors")
KIND = ""  # the key that no plain mapping may have
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

# How the items of each kind of collection are kept, and made into one again.
COLLECTIONS: dict[str, tuple[type, Callable[[list[object]], object]]] = {
    "tuple": (tuple, tuple),
    "set": (set, set),
    "frozenset": (frozenset, frozenset),
}
MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict}


def dump(value: object) -> dict[str, bytes]:
    """The files of a state by name; TypeError for what is no plain value, tensor or collection of such."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encoded(value, tensors)).encode()
    return {NAMES[0]: text, **({NAMES[1]: save(tensors)} if tensors else {})}


def parse(files: dict[str, bytes]) -> object:
    """The state of which these are the files."""
    tensors = load(files[NAMES[1]]) if NAMES[1] in files else {}
    return _decoded(json.loads(files[NAMES[0]]), tensors)


def read(folder: Path) -> object:
    """The state in a folder; that of an older checkpoint is in a file of torch's, of which only values are read."""
    files = {name: (folder / name).read_bytes() for name in NAMES if (folder / name).exists()}
    if files:
        return parse(files)
    old = folder / "callbacks.pt"
    try:
        return torch.load(old, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may make torch raise anything
        what = "is missing" if not old.exists() else "can't be read as values and tensors alone"
        raise UserError(f"{old} {what}: put back a copy, or remove {folder}, an older checkpoint is resumed") from error


def _encoded(value: object, tensors: dict[str, Tensor]) -> object:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_encoded(item, tensors) for item in value]
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {KIND: "tensor", "value": name}
    if type(value) is bytes:
        return {KIND: "bytes", "value": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {KIND: "complex", "value": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {KIND: "dtype", "value": str(value)}
    for name, (collection, _) in COLLECTIONS.items():
        if type(value) is collection:
            return {KIND: name, "value": [_encoded(item, tensors) for item in value]}  # type: ignore[attr-defined]
    kind = next((kind for kind, mapping in MAPPINGS.items() if type(value) is mapping), None)
    if kind and isinstance(value, dict):
        if kind == "dict" and KIND not in value and all(type(key) is str for key in value):
            return {key: _encoded(item, tensors) for key, item in value.items()}
        pairs = [[_encoded(key, tensors), _encoded(item, tensors)] for key, item in value.items()]
        return {KIND: kind, "value": pairs}
    raise TypeError(f"{type(value).__module__}.{type(value).__qualname__} is no plain value, tensor or collection")


def _decoded(value: object, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if KIND not in value:
        return {key: _decoded(item, tensors) for key, item in value.items()}
    kind, held = value[KIND], value["value"]
    if kind == "tensor":
        return tensors[held]
    if kind == "bytes":
        return base64.b64decode(held)
    if kind == "complex":
        return complex(*held)
    if kind == "dtype":
        return DTYPES[held]
    items = [_decoded(item, tensors) for item in held]
    return MAPPINGS[kind](items) if kind in MAPPINGS else COLLECTIONS[kind][1](items)
