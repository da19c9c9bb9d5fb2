"""A Hub data set → the files that hold its rows, in the Hub's own cache.

`datasets` says which files a split has; they are then read by our readers, because its own guess types. What it said is
kept in the cache folder, for a node without the network. A data set of files that we don't read comes from `datasets`.
"""

import hashlib
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

from sft.data.files import SEPARATOR_OF, Source, kind
from sft.errors import FULL_DISK, UserError, chain
from sft.runs import manifest

if TYPE_CHECKING:
    from datasets import Dataset

MODULES = {"json": "json", "csv": "csv", "tsv": "csv", "text": "text", "parquet": "parquet", "arrow": "arrow"}
FILE = re.compile(r"hf://datasets/(?P<repo>[^@]+)@(?P<revision>[^/]+)/(?P<name>.+)")


class Found(TypedDict):
    """Where `datasets` finds a data set."""

    files: dict[str, list[tuple[str, str, str]]]  # split → repository, commit, name in it
    directory: str  # in the cache of `datasets`, which names the data's version


def split_files(source: Source, split: str, cache_dir: Path | None) -> list[Path] | None:
    """The files of a split, downloaded; None if they must be left to `datasets`. UserError without such a split."""
    found = _found(source.path, source.name, cache_dir)
    if found is None:
        return None
    from huggingface_hub import hf_hub_download

    if split not in found["files"]:
        raise UserError(f"{source.path}: there is no split {split!r}, only {', '.join(found['files'])}")
    try:
        return [
            Path(hf_hub_download(repo, name, repo_type="dataset", revision=revision))
            for repo, revision, name in found["files"][split]
        ]
    except Exception as error:
        raise _failure(source, error) from error


def dataset(source: Source) -> "Dataset":
    """The rows as `datasets` loads them."""
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we report its errors ourselves
    try:
        return datasets.load_dataset(source.path, source.name, split=source.split)
    except Exception as error:
        raise _failure(source, error) from error


def fingerprint(source: Source, cache_dir: Path) -> str:
    """What `datasets` would call the split, in hexadecimal digits; made from the names and versions of its files."""
    found = _found(source.path, source.name, cache_dir)
    if found is None:
        return str(dataset(source)._fingerprint)
    from datasets.fingerprint import Hasher

    hasher = Hasher()
    hasher.update(found["directory"])
    hasher.update(source.split)
    return str(hasher.hexdigest())


@lru_cache
def _found(path: str, name: str | None, cache_dir: Path | None) -> Found | None:
    memo = None
    if cache_dir is not None:
        memo = cache_dir / "hub" / f"{hashlib.sha256(f'{path} {name}'.encode()).hexdigest()}.json"
    try:
        found = _ask(path, name)
    except Exception:  # no network, or no such data set, which `datasets` is asked for once more then
        if memo is None or not memo.exists():
            return None
        return cast(Found, manifest.read_sealed(memo, "remove it, and start where there is a network"))
    if memo is not None and found is not None:
        with suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            manifest.write_sealed(memo, found)
    return found


def _ask(path: str, name: str | None) -> Found | None:
    import datasets

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    builder = datasets.load_dataset_builder(path, name)
    files: dict[str, list[tuple[str, str, str]]] = {}
    for split, urls in (builder.config.data_files or {}).items():
        matches = [FILE.fullmatch(str(url)) for url in urls]
        kinds = {kind(Path(str(url))) for url in urls}
        if None in matches or len(kinds) > 1 or not _is_plain(builder.config, kinds.pop()):
            return None
        files[str(split)] = [(match["repo"], match["revision"], match["name"]) for match in matches if match]
    return {"files": files, "directory": Path(builder._relative_data_dir()).as_posix()} if files else None


def _is_plain(config: object, kind: str | None) -> bool:
    """Whether the files mean by themselves what the data set's own settings make of them."""
    module = type(config).__name__.removesuffix("Config").lower()
    if kind is None or MODULES[kind] != module:
        return False
    if module == "csv":
        usual = type(config)()
        names = ("header", "names", "index_col", "usecols", "skiprows", "nrows", "quotechar", "escapechar", "encoding")
        same = all(getattr(config, name) == getattr(usual, name) for name in names)
        return same and getattr(config, "sep", None) == SEPARATOR_OF[kind]
    return getattr(config, "field", None) is None and getattr(config, "columns", None) is None


def _failure(source: Source, error: Exception) -> Exception:
    causes = chain(error)
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in FULL_DISK:
            return cause
    # `datasets` wraps the error that says something in one that doesn't.
    cause = causes[1] if len(causes) > 1 and type(error).__name__ == "DatasetGenerationError" else error
    what = re.sub(r"\s+", " ", str(cause)).strip()[:300] or type(cause).__name__
    return UserError(f"{source.path} (not a local path, so a Hub data set): {what}")
