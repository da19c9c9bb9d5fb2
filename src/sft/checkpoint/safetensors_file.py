"""Safetensors files written a tensor at a time, which the library can't, and read in ranges of flat values.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with dtype,
shape and place of each tensor, then the tensors' bytes end to end.
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from xxhash import xxh3_128

from sft.runs.manifest import Entry

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}


def read_range(file: safe_open, name: str, start: int, stop: int) -> Tensor:
    """The flat values from `start` to `stop` of a tensor, 1-D. Only the rows that hold them are read."""
    values = file.get_slice(name)
    shape = values.get_shape()
    if not shape or not shape[0]:
        return file.get_tensor(name).reshape(-1)[start:stop]
    row = torch.Size(shape[1:]).numel()
    first, last = start // row, -(-stop // row)
    return values[first:last].reshape(-1)[start - first * row : stop - first * row]


def write(path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], read: Callable[[str], Tensor]) -> Entry:
    """Writes `path`; `layout` gives dtype and shape of each tensor, `read(name)` the tensor when its turn comes.

    Returns the file's size and checksum.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + dtype.itemsize * torch.Size(shape).numel()
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        head = struct.pack("<Q", len(text)) + text
        file.write(head)
        digest = xxh3_128(head)
        for name, (dtype, shape) in layout.items():
            tensor = read(name)
            assert tensor.dtype == dtype and tensor.shape == torch.Size(shape), f"{name} is not as announced"
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            digest.update(data)
            del tensor, data  # before the next is read
    return {"bytes": len(head) + end, "xxh3_128": digest.hexdigest()}
