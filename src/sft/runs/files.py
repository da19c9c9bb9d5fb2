"""Files that are there whole or not at all."""

import json
import os
import tempfile
from pathlib import Path

from sft.errors import UserError

TRIAL = ".sft-"  # begins the name of what is only made to see whether a folder can be written


def write_text(path: Path, text: str) -> None:
    """Writes the text beside `path` and renames it: a reader never sees half of it, nor does a kill leave half, nor, as
    the text is on the disk before, a power cut an empty file."""
    beside = unfinished(path)
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def input_file(path: str, setting: str) -> Path:
    """A file that a command will read; UserError where there is none."""
    file = Path(path).expanduser()
    if file.is_dir():
        raise UserError(f"{setting}={path} is a folder: name a file")
    if not file.exists():
        raise UserError(f"{setting}={path}: there is no such file (looked in {file.absolute().parent})")
    return file


def output_file(path: str, setting: str) -> Path:
    """A file that a command will write; UserError before its work where that can't be done."""
    file = Path(path).expanduser()
    folder = file.absolute().parent
    if file.is_dir():
        raise UserError(f"{setting}={path} is a folder: name a file")
    if not folder.is_dir():
        raise UserError(f"{setting}={path}: there is no folder {folder}: make it, or name another file")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise UserError(f"{setting}={path} can't be written: name another file")
    return file


def check_writable(folder: Path, setting: str) -> None:
    """Refuses a folder that can't be made or written: makes a temporary folder there and removes it."""
    existing = nearest_existing(folder)
    try:
        tempfile.TemporaryDirectory(prefix=TRIAL, dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({existing}: {error.strerror}): set {setting} to another folder"
        ) from error


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def unfinished(path: Path) -> Path:
    """Where a file lies while it is written. The name is fixed, so the next attempt replaces a killed one's file."""
    return path.with_name(f".{path.name}.unfinished")


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
