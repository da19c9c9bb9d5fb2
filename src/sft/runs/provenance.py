"""Where a run came from: code, command, versions."""

import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from sft.config.check import targets
from sft.config.schema import OURS
from sft.runs import manifest
from sft.runs.secrets import of_code, redacted

ADVICE = (
    "put back a copy; without one remove it: the run resumes, and its data and its model are no longer compared with "
    "those that it began with"
)
PACKAGES = (
    "torch",
    "lightning",
    "deepspeed",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "hydra-core",
)


class Provenance(TypedDict):
    """All that is needed to make a run again. Without a checkout, `commit` and `uncommitted_diff` are None."""

    started: str
    command: list[str]
    commit: str | None
    uncommitted_diff: str | None  # without what is secret
    functions: dict[str, str]  # that are the user's own, by setting
    python: str
    versions: dict[str, str]


class FirstBatch(TypedDict):
    """Of what a model's first batch has proven (`sft.model.first_batch`), what others read."""

    attention: str  # as transformers knows it
    apart: bool  # the samples of a micro-batch run apart
    said: str  # in a line
    where: dict[str, object]  # device, versions and settings


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect(settings: Mapping[str, object] | None = None) -> Provenance:
    """`settings`: the run's, of which no secret is written."""
    diff = _git("diff", "HEAD")
    return {
        "started": now(),
        "command": [redacted(word, settings) for word in sys.argv],
        "commit": commit(),
        "uncommitted_diff": diff and of_code(diff, settings),
        "functions": {name: target for name, target in targets(settings or {}) if not target.startswith(OURS)},
        "python": platform.python_version(),
        "versions": {package: installed(package) or "not installed" for package in PACKAGES},
    }


def first_batch(folder: Path) -> FirstBatch | None:
    """What a run's first batch has proven; None of one that has none yet, or was begun before there was one."""
    return recorded(folder).get("first_batch")  # type: ignore[return-value]


def amend(folder: Path, **parts: object) -> None:
    """Writes parts into a run's provenance.json, if there is one."""
    if before := recorded(folder):
        write(folder, before | parts)


def write(folder: Path, parts: Mapping[str, object]) -> None:
    """Writes a run's provenance.json."""
    manifest.write_sealed(folder / "provenance.json", parts)


def recorded(folder: Path) -> dict[str, object]:
    """All that a run's provenance.json holds; empty where there is none. Damaged where it isn't what was written."""
    try:
        return manifest.read_sealed(folder / "provenance.json", ADVICE)
    except FileNotFoundError:
        return {}


def commit() -> str | None:
    """Of this code; None outside a checkout."""
    return _git("rev-parse", "HEAD")


def is_library(file: str) -> bool:
    """Whether a source file is neither this project's nor the user's own."""
    if Path(file).is_relative_to(Path(__file__).parents[1]):
        return False
    return file.startswith((sys.prefix, sys.base_prefix, "<")) or "site-packages" in file


def installed(package: str) -> str | None:
    """Its version; None where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str, cwd: Path = Path(__file__).parent) -> str | None:
    """The output of git in the folder of this code; None outside a checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
