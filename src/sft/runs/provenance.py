"""Where a run came from: code, command, versions."""

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def collect() -> dict[str, Any]:
    """What one needs to know to make the run again."""
    packages = (
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
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "started": now(),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_diff": _git("diff", "HEAD"),
        "python": platform.python_version(),
        "versions": versions,
    }


def _git(*arguments: str) -> str | None:
    """What git says of the folder that this code lies in; None outside a checkout."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
