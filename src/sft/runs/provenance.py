"""Where a run came from: code, command, versions."""

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

from sft.runs.files import write_json

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
    uncommitted_diff: str | None
    python: str
    versions: dict[str, str]


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect() -> Provenance:
    return {
        "started": now(),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_diff": _git("diff", "HEAD"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def recorded(folder: Path) -> dict[str, Any]:  # type: ignore[explicit-any]
    """A run's provenance.json; empty where there is none."""
    try:
        return dict(json.loads((folder / "provenance.json").read_text()))
    except FileNotFoundError:
        return {}


def amend(folder: Path, **parts: object) -> None:
    """Writes parts into a run's provenance.json, if there is one."""
    if before := recorded(folder):
        write_json(folder / "provenance.json", before | parts)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git(*arguments: str) -> str | None:
    """The output of git in the folder of this code; None outside a checkout."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
