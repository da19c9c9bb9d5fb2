"""Size and checksum of every byte that a number comes from.

A folder that is written once (a checkpoint, a token store, an export) holds a `manifest.json`, written last:

    {"format": 1, "files": {NAME: {"bytes": 123, "xxh3_128": "..."}}, "checksum": "..."}

A JSON file that is written again and again (`status.json`, `provenance.json`) holds its own checksum, as the manifest
itself does, under the key `checksum`: no rename could replace it and a manifest beside it at once.

XXH3 finds any damage by accident, not one by somebody who means it, and is faster than disks are.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict, cast

from xxhash import xxh3_128

from sft.errors import UserError
from sft.runs.files import fsync, write_text

NAME = "manifest.json"
FORMAT = 1
SEAL = "checksum"
BLOCK = 2**22  # bytes read at once
NUM_THREADS = 8


class Entry(TypedDict):
    """Of one file."""

    bytes: int
    xxh3_128: str


Manifest = dict[str, Entry]  # by the file's name in the folder


class Damaged(UserError):
    """A file is not what was written. `what`: the file and what is wrong with it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}: {advice}")
        self.what = what


def entry(path: Path) -> Entry:
    """Size and checksum of a file."""
    digest, size = xxh3_128(), 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def entries(folder: Path, names: Iterable[str]) -> Manifest:
    """Of several files, read side by side."""
    names = sorted(names)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: entry(folder / name), names), strict=True))


def write(folder: Path, files: Mapping[str, Entry]) -> None:
    """Writes the folder's manifest; it and the folder's names are on the disk afterwards."""
    write_sealed(folder / NAME, {"format": FORMAT, "files": dict(sorted(files.items()))})


def read(folder: Path, advice: str) -> Manifest | None:
    """The folder's manifest; None of one that was written before there were any. Damaged for one that can't be read."""
    try:
        found = read_sealed(folder / NAME, advice, since=1)
    except FileNotFoundError:
        return None
    if found.get("format") != FORMAT:
        raise Damaged(f"{folder / NAME} has format {found.get('format')}, this is {FORMAT}", advice)
    return cast(Manifest, found["files"])


def fault(path: Path, expected: Entry, contents: bool = True) -> str | None:
    """What is wrong with a file: that it is missing, its size or, with `contents`, its checksum; None for nothing."""
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path} is damaged (it has {size:,} bytes, not {expected['bytes']:,})"
        if contents and entry(path) != expected:
            return f"{path} is damaged (its checksum is another)"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:  # of a disk that fails, too
        return f"{path} can't be read ({error.strerror or error})"
    return None


def faults(folder: Path, files: Mapping[str, Entry], contents: bool = True) -> list[str]:
    """What is wrong with a folder's files, in the order of their names."""
    names = sorted(files)
    with ThreadPoolExecutor(NUM_THREADS if contents else 1) as pool:
        return [*filter(None, pool.map(lambda name: fault(folder / name, files[name], contents), names))]


def write_sealed(path: Path, value: Mapping[str, object]) -> None:
    """Writes a JSON object with its own checksum, whole or not at all, on the disk."""
    write_text(path, json.dumps({**value, SEAL: _seal(value)}, indent=2) + "\n")
    fsync(path.parent)


def read_sealed(path: Path, advice: str, since: int | None = None) -> dict[str, object]:
    """The object without its checksum. One that has none was written before there were any, or by hand: by its
    `format` before that which is the first to have one, `since`, if it has formats at all.

    Damaged, with the advice, where it is no JSON object or its checksum is another; FileNotFoundError.
    """
    try:
        value: object = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        what = "is empty" if not path.stat().st_size else "is damaged (it is no JSON)"
        raise Damaged(f"{path} {what}", advice) from None
    if not isinstance(value, dict):
        raise Damaged(f"{path} is damaged (it is no JSON object)", advice)
    seal = value.pop(SEAL, None)
    if seal is None and since is not None and not (type(value.get("format")) is int and value["format"] < since):
        raise Damaged(f"{path} is damaged (it has no checksum)", advice)
    if seal is not None and seal != _seal(value):
        raise Damaged(f"{path} is damaged (its checksum is another)", advice)
    return value


def _seal(value: Mapping[str, object]) -> str:
    # Through JSON once: a tuple is a list there, and a number that is a key a string.
    plain: object = json.loads(json.dumps(value))
    return xxh3_128(json.dumps(plain, sort_keys=True).encode()).hexdigest()
