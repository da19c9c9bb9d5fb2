"""Where a run came from: code, command, versions."""

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypedDict

from sft.config.check import targets
from sft.config.schema import OURS
from sft.runs.files import write_json
from sft.runs.secrets import of_code, redacted

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
    own_code: dict[str, str]  # sha256 of each file that the commit and the diff lack, of those that were loaded
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
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_diff": diff and of_code(diff, settings),
        "own_code": own_code(),
        "functions": {name: target for name, target in targets(settings or {}) if not target.startswith(OURS)},
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def first_batch(folder: Path) -> FirstBatch | None:
    """What a run's first batch has proven; None of one that has none yet, or was begun before there was one."""
    found: dict[str, FirstBatch] = _recorded(folder)
    return found.get("first_batch")


def amend(folder: Path, **parts: object) -> None:
    """Writes parts into a run's provenance.json, if there is one."""
    before: dict[str, object] = _recorded(folder)
    if before:
        write_json(folder / "provenance.json", before | parts)


def _recorded(folder: Path) -> dict:
    """Empty where there is none."""
    try:
        return json.loads((folder / "provenance.json").read_text())
    except FileNotFoundError:
        return {}


def own_code() -> dict[str, str]:
    """Of the modules that are loaded: those of the user, and those here that git doesn't know."""
    here = Path(__file__).parents[1]
    unknown = {here / name for name in (_git("ls-files", "--others", cwd=here) or "").splitlines()}
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    found = {}
    for name in sorted(filter(None, files)):
        file = Path(name)
        if file in unknown or not (file.is_relative_to(here) or is_library(name)):
            with suppress(OSError):
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def is_library(file: str) -> bool:
    """Whether a source file is neither this project's nor the user's own."""
    if Path(file).is_relative_to(Path(__file__).parents[1]):
        return False
    return file.startswith((sys.prefix, sys.base_prefix, "<")) or "site-packages" in file


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str, cwd: Path = Path(__file__).parent) -> str | None:
    """The output of git in the folder of this code; None outside a checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
