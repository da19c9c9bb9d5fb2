"""What W&B has of a run that it has logged offline."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.runs.answers_file import Answer

BLOCK = 32768
ANSWER: Answer = {
    "step": 0,
    "number": 0,
    "source": "rows.jsonl",
    "row": 57,
    "prompt": "Reverse ab.",
    "reference": "ba",
    "base": None,
    "answer": "ab ab",
    "score": 0.25,
    "base_score": None,
    "num_tokens": 6,
    "num_reference_tokens": 3,
    "stopped": True,
}


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the one run in `folder/wandb`."""
    return [_items(record.history.item) for record in _of_kind(folder, "history")]


def config(folder: Path) -> dict[str, Any]:
    """Its configuration, after all updates."""
    values: dict[str, Any] = {}
    for record in (*_of_kind(folder, "run"), *_of_kind(folder, "config")):
        values |= _items((record.run.config if record.HasField("run") else record.config).update)
    return values


def run(folder: Path) -> dict[str, Any]:
    """How it was begun."""
    (record,) = _of_kind(folder, "run")
    begun = record.run
    return {
        "id": begun.run_id,
        "name": begun.display_name,
        "project": begun.project,
        "entity": begun.entity,
        "group": begun.run_group,
        "job_type": begun.job_type,
        "tags": list(begun.tags),
        "notes": begun.notes,
    }


def summary(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for record in _of_kind(folder, "summary"):
        values |= _items(record.summary.update)
    return values


def artefacts(folder: Path) -> list[dict[str, Any]]:
    """Of each its name, type, aliases, and its files with the place that a reference names, or None."""
    return [
        {
            "name": record.artifact.name,
            "type": record.artifact.type,
            "aliases": sorted(record.artifact.aliases),
            "files": {each.path: each.ref or None for each in record.artifact.manifest.contents},
        }
        for record in _of_kind(folder, "artifact")
    ]


def table(folder: Path, name: str) -> dict[str, Any]:
    """The newest table of that name: `columns` and `data`."""
    place = [row[f"{name}.path"] for row in history(folder) if f"{name}.path" in row][-1]
    (file,) = folder.glob(f"wandb/offline-run-*/files/{place}")
    return json.loads(file.read_text())


def console(folder: Path) -> str:
    """What was printed while it was logged."""
    return "".join(record.output_raw.line for record in _of_kind(folder, "output_raw"))


def alerts(folder: Path) -> list[tuple[str, str]]:
    return [(record.alert.title, record.alert.text) for record in _of_kind(folder, "alert")]


def _of_kind(folder: Path, kind: str) -> list[Any]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # the file is whole when wandb's process has ended
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    records = [Record.FromString(data) for data in _records(path.read_bytes())]
    return [record for record in records if record.HasField(kind)]


def _items(items: Any) -> dict[str, Any]:
    return {each.key or ".".join(each.nested_key): json.loads(each.value_json) for each in items}


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
