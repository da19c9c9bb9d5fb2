"""A run's checkpoints as files: which are there, and which of them are whole. Without torch."""

import math
import re
import zlib
from collections.abc import Callable
from pathlib import Path

from sft.runs import manifest

ADVICE = "put back a copy, or remove the folder: sft train resumes from the newest checkpoint that is whole"
NONE_IS_WHOLE = "no checkpoint is whole: put back a copy of one, or move {} away: the same command starts the run anew"
ASIDE = "damaged-"  # begins the name of one that a resume has skipped
NEEDED = ("step", "format", "num_steps", "stopped", "val_loss", "shapes", "buffers", "groups", "scalars", "files")
NAME = re.compile(r"step-(\d{8,})")


def folders(checkpoints: Path) -> dict[int, Path]:
    """Each checkpoint's folder by its step, ascending. Nothing else counts, whatever a backup has left there."""
    found = {}
    for path in checkpoints.glob("step-*"):
        if (match := NAME.fullmatch(path.name)) and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def state(folder: Path) -> dict[str, object]:
    """Its `state.json`; Damaged where that isn't what was written, isn't there, or is that of another step."""
    try:
        recorded = manifest.read_sealed(folder / "state.json", ADVICE, since=3)
    except FileNotFoundError:
        raise manifest.Damaged(f"{folder / 'state.json'} is missing", ADVICE) from None
    if lacking := [name for name in NEEDED if name not in recorded]:
        raise manifest.Damaged(f"{folder / 'state.json'} is damaged (it has no {lacking[0]})", ADVICE)
    if recorded["step"] != int(folder.name.removeprefix("step-")):
        raise manifest.Damaged(f"{folder} holds step {recorded['step']}: a copy under another's name", ADVICE)
    return recorded


def faults(folder: Path, contents: bool = True, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint's files, each in a line; `contents`: checksums, too, not the sizes alone.
    `share`: of the files only those of this rank, of so many."""
    rank, world_size = share
    try:
        recorded, files = state(folder), manifest.read(folder, ADVICE)
    except manifest.Damaged as error:
        return [error.what] if rank == 0 else []
    found = recorded.get("files")
    if files is None:
        if not isinstance(found, dict):
            return [f"{folder / manifest.NAME} is missing"] if rank == 0 else []
        old = list(found.items())[rank::world_size]
        try:
            return [*filter(None, (_fault_of_old(folder / name, expected, contents) for name, expected in old))]
        except (KeyError, TypeError):
            return [f"{folder / 'state.json'} is damaged (its files have no size or checksum)"]
    mine = sorted(files)[rank::world_size]
    return manifest.faults(folder, {name: files[name] for name in mine}, contents)


def whole(
    checkpoints: Path, before: float = math.inf, contents: Callable[[Path], bool] = lambda folder: False
) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint before a step that is whole, and what is wrong with each after it. `contents`: of which
    folders the checksums are compared, too, not the sizes alone."""
    skipped: dict[Path, str] = {}
    for step, folder in reversed(folders(checkpoints).items()):
        if step >= before:
            continue
        wrong = faults(folder, False) or (faults(folder) if contents(folder) else [])
        if not wrong:
            return folder, skipped
        skipped[folder] = wrong[0]
    return None, skipped


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that nothing takes it for one."""
    target, number = folder.with_name(f"{ASIDE}{folder.name}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{ASIDE}{folder.name}-{number}")
    return folder.rename(target)


def _fault_of_old(path: Path, expected: dict[str, int], contents: bool) -> str | None:
    """Of a shard that was written before there were manifests: `state.json` has its size and CRC-32."""
    if not path.exists():
        return f"{path} is missing"
    if (size := path.stat().st_size) != expected["bytes"]:
        return f"{path} is damaged (it has {size:,} bytes, not {expected['bytes']:,})"
    if contents and _crc32(path) != expected["crc32"]:
        return f"{path} is damaged (its checksum is another)"
    return None


def _crc32(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(manifest.BLOCK):
            crc = zlib.crc32(block, crc)
    return crc
