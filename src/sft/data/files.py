"""Which files hold the rows of a source."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Final

from sft.errors import UserError

KINDS: Final = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
TEXT: Final = ("json", "csv", "tsv", "text")  # kinds that may be compressed
SEPARATOR_OF: Final = {"csv": ",", "tsv": "\t"}
COMPRESSIONS: Final = {".gz": "gzip", ".zst": "zstd"}
SPLIT_LIKE = re.compile(r"(train|training|valid|validation|val|dev|test|testing|eval|evaluation)(?![a-z])", re.I)
SAVED: Final = "state.json"  # in each folder that `save_to_disk` writes
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "config.json", SAVED)  # no rows


@dataclass(frozen=True)
class Source:
    """Where rows come from. A row is named by its number in the split, counted from 0."""

    path: str  # a file, files ("shards/*.jsonl"), a folder of splits or shards, a saved data set, or a Hub name
    split: str = "train"  # also a slice: "train[:1000]"
    name: str | None = None  # configuration of a Hub data set: a subfolder of its copy
    sample_by: str = "line"  # of a .txt file, a row is a line or the whole document

    def __str__(self) -> str:
        path = Path(self.path)
        return path.name if kind(path) else f"{self.path} ({self.split})"


def kind(path: Path) -> str | None:
    """The kind of a file of rows by its name, compressed or not; None for any other."""
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        inner = KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return inner if inner in TEXT else None
    return KINDS.get(path.suffix)


def short_names(sources: Sequence[Source]) -> list[str]:
    """A name for each source that tells it from the others: the last part of its path, or as many as it takes, and its
    split where the paths are the same. Of letters, digits and `_`, `-`, `.`, `/`."""
    paths = [Path(source.path) for source in sources]
    parts = [(*path.parts[:-1], stem(path) if kind(path) else path.name) for path in paths]

    def named(num: int, split: bool) -> list[str]:
        names = ["/".join(of_path[-num:]) for of_path in parts]
        names = [f"{name}-{source.split}" if split else name for name, source in zip(names, sources, strict=True)]
        return [re.sub(r"[^A-Za-z0-9_./-]+", "_", name).strip("./_") or "_" for name in names]

    longest = max(map(len, parts), default=1)
    tries = (named(num, split) for split in (False, True) for num in range(1, longest + 1))
    found = next((names for names in tries if len({*names}) == len(names) and "_" not in names), None)
    return found or [f"{number}-{name}" for number, name in enumerate(named(1, False), 1)]


def stem(path: Path) -> str:
    """The name without the suffixes that say what kind it is."""
    name = path.with_suffix("") if path.suffix in COMPRESSIONS else path
    return name.stem


def base_splits(split: str) -> list[str]:
    """train[:1000] → train; train+test → train, test"""
    return list(dict.fromkeys(part.partition("[")[0].strip() for part in split.split("+")))


def is_single_file(source: Source) -> bool:
    """Whether the path names a file or files, which are one split, whatever they are called."""
    path = Path(source.path).expanduser()
    return path.is_file() or (not path.exists() and bool(_matches(source.path)))


def local_files(source: Source) -> list[Path] | None:
    """The files that hold the rows; None for a Hub data set. UserError for a path or split that does not exist."""
    files = [split_files(source, split) for split in base_splits(source.split)]
    return None if files[0] is None else list(dict.fromkeys(file for of_split in files for file in of_split or ()))


def split_files(source: Source, split: str) -> list[Path] | None:
    """The same of one split alone."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if kind(path) is None:
            raise UserError(f"{path}: not a known kind of file ({', '.join(KINDS)})")
        return [path]
    if path.is_dir():
        saved = saved_folder(path, split)
        if saved is not None:
            return sorted(file for file in saved.iterdir() if file.is_file())
        return _in_folder(path, split, source.name)
    if matches := _matches(source.path):
        return _one_kind([file for file in map(Path, matches) if kind(file)], f"{source.path}")
    if source.path.startswith((".", "/", "~")) or kind(path) or "*" in source.path:
        raise UserError(f"{source.path}: no such file or folder (looked in {Path.cwd()})")
    return None


def saved_folder(path: Path, split: str) -> Path | None:
    """The folder in which `save_to_disk` put the split; None if it did not write this folder."""
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        folder = path / split
    elif (path / SAVED).is_file():
        splits, folder = ["train"], path
    else:
        return None
    if split not in splits:
        raise UserError(f"{path}: the saved data set has no split {split!r}, only {', '.join(splits)}")
    return folder


def _matches(pattern: str) -> list[str]:
    return sorted(match for match in glob(str(Path(pattern).expanduser())) if Path(match).is_file())


def _in_folder(folder: Path, split: str, name: str | None) -> list[Path]:
    """Files `{split}.*` and `{split}-*.*`, or those of a folder `{split}/`; in the folder itself, in the copy of a Hub
    repository under `data/`, and first under the configuration's name. Without any split, all files are train."""
    places = [folder, folder / "data"]
    if name:
        places = [folder / name, folder / "data" / name, *places]
    files = {place: _data_files(place) for place in places if place.is_dir()}
    for place, data_files in files.items():
        chosen = [file for file in data_files if stem(file) == split or stem(file).startswith(f"{split}-")]
        if not chosen and (place / split).is_dir():
            chosen = _data_files(place / split)
        if chosen:
            return _one_kind(chosen, f"{folder}: split {split!r}")
    every = [file for data_files in files.values() for file in data_files]
    if split == "train" and not any(SPLIT_LIKE.match(file.name) for file in every):
        shards = next((_drop_text(data_files) for data_files in files.values() if data_files), [])
        if shards:
            return _one_kind(shards, f"{folder}")
    names = ", ".join(file.name for file in every[:10]) or "no data file"
    subfolders = sorted(place.name for place in folder.iterdir() if place.is_dir() and _data_files(place))
    hint = f": set data.name to one of its folders {', '.join(subfolders[:10])}" if subfolders and not every else ""
    raise UserError(f"{folder}: no file for split {split!r} ({split}.jsonl or the like), only {names}{hint}")


def _data_files(folder: Path) -> list[Path]:
    hidden_or_about = (".", *ABOUT)
    return sorted(
        file for file in folder.iterdir() if kind(file) and file.is_file() and not file.name.startswith(hidden_or_about)
    )


def _drop_text(files: list[Path]) -> list[Path]:
    """Without README.txt and the like, unless there is nothing else."""
    return [file for file in files if kind(file) != "text"] or files


def _one_kind(files: list[Path], where: str) -> list[Path]:
    files = _drop_text(files)
    names = ", ".join(file.name for file in files[:10])
    if not files:
        raise UserError(f"{where}: no known kind of file ({', '.join(KINDS)})")
    if len({kind(file) for file in files}) > 1:
        raise UserError(f"{where} is in several formats ({names}): give the path of one file")
    if len({(file.parent, stem(file)) for file in files}) < len(files):
        raise UserError(f"{where} has a file twice ({names}): remove one of them")
    return files
