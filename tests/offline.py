"""What W&B has of a run that it has logged offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 32768


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the one run in `folder/wandb`."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows = []
    for data in _records(path.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            rows.append({each.key or ".".join(each.nested_key): json.loads(each.value_json) for each in items})
    return rows


def _records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format, after W&B's own 7 bytes: (checksum, size, kind), then the record or a part of it."""
    at, parts = 7, []
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []
