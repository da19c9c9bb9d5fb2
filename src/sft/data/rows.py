"""Files, folders, saved data sets and Hub data sets → rows."""

import csv
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.errors import FULL_DISK, BadRow, UserError, chain

if TYPE_CHECKING:
    from datasets import Dataset

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXT = (".jsonl", ".json", ".csv")
SAVED = "state.json"  # in each folder that `save_to_disk` writes


@dataclass(frozen=True)
class Source:
    """Where rows come from. A row is named by its number in the split, counted from 0."""

    path: str  # a file, a folder with `{split}.jsonl` or the like, a saved data set, or a Hub name
    split: str = "train"  # of files and Hub data sets also a slice: "train[:1000]"
    name: str | None = None  # Hub configuration
    sample_by: str = "line"  # of a .txt file, a row is a line or the whole document

    def __str__(self) -> str:
        path = Path(self.path)
        return path.name if path.suffix in LOADERS else f"{self.path} ({self.split})"


def first_rows(source: Source, n: int, *, cache_dir: Path | None = None) -> list[dict[str, object]]:
    """The first n good rows, or all if there are fewer; reads only the beginning, and writes no cache."""
    rows = (row for row in all_rows(source, cache_dir=cache_dir) if not isinstance(row, BadRow))
    return [row for row, _ in zip(rows, range(n), strict=False)]


def all_rows(source: Source, *, cache_dir: Path | None = None) -> Iterator[dict[str, object] | BadRow]:
    """Each row in order; in the place of a bad one a BadRow that says where it is."""
    with tempfile.TemporaryDirectory(prefix="sft-rows-") as cache:
        for row in load_rows(source, cache_dir or Path(cache)):
            yield dict(row)


def load_rows(source: Source, cache_dir: Path) -> "Dataset":
    """All rows of a source, memory-mapped.

    `datasets` puts its Arrow copy of local files under `cache_dir` and locks it: give it a private one, because some
    cluster file systems have no locks. UserError in one line for anything that cannot be read, with the file and line
    if they are known; OSError if the disk is full.
    """
    files = local_files(source)
    for file in files or ():
        if file.stat().st_size == 0:
            raise UserError(f"{file}: the file is empty")
        if file.suffix in TEXT:  # `datasets` accepts bad bytes, and fails later, when the row is read
            _check_encoding(file)
    try:
        rows = _load(source, files, cache_dir)
    except Exception as error:
        causes = chain(error)
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno in FULL_DISK:
                raise cause from error
        # `datasets` wraps the error that says something in one that doesn't.
        cause = causes[1] if len(causes) > 1 and type(error).__name__ == "DatasetGenerationError" else error
        where = f"{source.path} (not a local path, so a Hub data set)" if files is None else str(source)
        raise UserError(_fault(files or []) or f"{where}: {_one_line(cause)}") from error
    if len(rows) == 0:
        raise UserError(f"{source}: it has no rows")
    return rows


def local_files(source: Source) -> list[Path] | None:
    """The files that hold the rows; None for a Hub data set. UserError for a path or split that does not exist."""
    path = Path(source.path).expanduser()
    if path.is_file():
        if path.suffix not in LOADERS:
            raise UserError(f"{path}: not a known kind of file ({', '.join(LOADERS)})")
        return [path]
    if path.is_dir():
        saved = _saved(path, source.split)
        if saved is not None:
            return sorted(file for file in saved.iterdir() if file.is_file())
        return _split_files(path, _base(source.split))
    if source.path.startswith((".", "/", "~")) or path.suffix in LOADERS:
        raise UserError(f"{source.path}: no such file or folder (looked in {Path.cwd()})")
    return None


def _load(source: Source, files: list[Path] | None, cache_dir: Path) -> "Dataset":
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we report its errors ourselves
    if files is None:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    if Path(source.path).expanduser().is_dir() and any(file.name == SAVED for file in files):
        return datasets.load_from_disk(str(files[0].parent))
    options = {}
    if files[0].suffix == ".csv":  # text as it stands there: 007 is no number, and NA not a missing value
        with files[0].open(newline="", encoding="utf-8-sig") as file:
            columns = next(csv.reader(file))
        features = datasets.Features({column: datasets.Value("string") for column in columns})
        options = {"features": features, "keep_default_na": False}
    return datasets.load_dataset(
        LOADERS[files[0].suffix],
        data_files={_base(source.split): [str(file) for file in files]},
        split=source.split,
        cache_dir=str(cache_dir),
        **options,
    )


def _base(split: str) -> str:
    """train[:1000] → train"""
    return split.partition("[")[0]


def _saved(path: Path, split: str) -> Path | None:
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


def _split_files(folder: Path, split: str) -> list[Path]:
    data_files = sorted(file for file in folder.iterdir() if file.suffix in LOADERS)
    files = [file for file in data_files if file.stem == split or file.stem.startswith(f"{split}-")]
    if not files:
        names = ", ".join(file.name for file in data_files[:10]) or "no data file"
        raise UserError(f"{folder}: no file for split {split!r} ({split}.jsonl or the like), only {names}")
    if len({LOADERS[file.suffix] for file in files}) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"{folder}: split {split!r} is in several formats ({names}): give the path of one file")
    return files


def _check_encoding(file: Path) -> None:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise UserError(
                    f"{file}, line {number}: not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8"
                ) from error


def _fault(files: list[Path]) -> str | None:
    """The first fault in files of JSON, with its line, as far as we can tell."""
    for file in files:
        if LOADERS.get(file.suffix) == "json" and file.name not in (SAVED, "dataset_info.json"):
            with file.open(encoding="utf-8") as lines:
                is_list = lines.readline().lstrip().startswith("[")
            fault = _list_fault(file) if is_list else _lines_fault(file)
            if fault:
                return fault
    return None


def _lines_fault(file: Path) -> str | None:
    seen: dict[str, tuple[int, str]] = {}  # column → the first line that has it, and its type there
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                return f"{file}, line {number}: broken JSON ({_one_line(error)}): correct or remove the line"
            if not isinstance(row, dict):
                return f"{file}, line {number}: a row is a JSON object, not {_json_type(row)}"
            for column, value in row.items():
                if value is None:
                    continue
                first, kind = seen.setdefault(column, (number, _json_type(value)))
                if kind != _json_type(value):
                    return (
                        f"{file}, line {number}: column {column!r} holds {_json_type(value)}, "
                        f"but {kind} in line {first}: give it one type"
                    )
    return None


def _list_fault(file: Path) -> str | None:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"{file}, line {error.lineno}: broken JSON ({_one_line(error)})"
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            return f"{file}, row {number}: a row is a JSON object, not {_json_type(row)}"
    return None


def _json_type(value: object) -> str:
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "an object")


def _one_line(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error)).strip()[:300] or type(error).__name__
