"""Safetensors files written one tensor at a time, so that no more than one is ever held.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header with dtype,
shape and place of each tensor, then the tensors' bytes end to end.
"""

import json
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

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


def write(
    path: Path, layout: Mapping[str, tuple[torch.dtype, Sequence[int]]], read: Callable[[str], Tensor]
) -> dict[str, int]:
    """Writes `path`; `layout` gives dtype and shape of each tensor, `read(name)` the tensor when its turn comes.

    Returns the file's size and checksum: {"bytes": ..., "crc32": ...}.
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
        crc = zlib.crc32(head)
        for name, (dtype, shape) in layout.items():
            tensor = read(name)
            assert tensor.dtype == dtype and tensor.shape == torch.Size(shape), f"{name} is not as announced"
            data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
            file.write(data)
            crc = zlib.crc32(data, crc)
            del tensor, data  # before the next is read
    return {"bytes": len(head) + end, "crc32": crc}
