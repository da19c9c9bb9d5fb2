"""What trackers are told of a run: its name in their lists, its configuration, and where it came from."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sft.config import arguments
from sft.errors import UserError

LARGEST = 100_000  # bytes of a ledger in a tracker's configuration


def configuration(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration, nested, and beside its groups what the run's folder holds of code, data and ranks."""
    provenance = _read(folder / "provenance.json")
    recipe, ledger = _read(folder / "recipe.json"), _read(folder / "data.json")
    told = {
        "recipe": recipe,
        "hosts": recipe.get("hosts") or [socket.gethostname()],
        "commit": provenance.get("commit"),
        "versions": provenance.get("versions"),
        "data_fingerprint": provenance.get("data"),
        "ledger": ledger if len(json.dumps(ledger)) <= LARGEST else None,
    }
    return {**config, **{name: value for name, value in told.items() if value}}


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}


def label(run: str, named: bool) -> str:
    """What a run is called where people read it: of a sweep by what differs, as `lr=1e-5 seed=1`, else by its name.
    `named`: it has a name that the user gave it."""
    varied = [] if named else _varied()
    names = [name for name, _ in varied]
    short = [name.rpartition(".")[2] for name in names]
    parts = [
        f"{last if short.count(last) == 1 else name}={value}" for (name, value), last in zip(varied, short, strict=True)
    ]
    return " ".join(parts)[:128] or run


def _varied() -> list[tuple[str, str]]:
    """Names and values of the settings that a sweep has chosen for this run: of `sft train -m`, of a job array and of
    W&B's agent."""
    if file := os.environ.get("WANDB_SWEEP_PARAM_PATH"):
        chosen = yaml.safe_load(Path(file).read_text())
        return [(name, _short(given["value"])) for name, given in chosen.items() if isinstance(given, dict)]
    typed: Iterable[str] | None = None
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        typed = _settings(sys.argv[2:])
    elif sweep := os.environ.get("SFT_SWEEP"):
        typed = _settings(["-m", *shlex.split(sweep)])
    if typed is None:
        return []
    fixed = set(typed)
    overrides = [override for override in HydraConfig.get().overrides.task if override not in fixed]
    given = [override.lstrip("+").partition("=") for override in overrides]
    return [(name, _short(value)) for name, _, value in given if not name.startswith(("trainer.", "runs_dir"))]


def _settings(typed: list[str]) -> list[str] | None:
    try:
        return arguments.parse("train", typed).settings
    except UserError:  # it was typed otherwise: in a process of a job
        return None


def _short(value: object) -> str:
    """A number in four digits, as people write it."""
    try:
        number = float(str(value))
    except ValueError:
        return str(value).strip("\"'")
    return str(value) if len(str(value)) <= 7 else f"{number:.4g}"
