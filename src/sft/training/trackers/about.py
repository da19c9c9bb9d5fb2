"""What trackers are told of a run: its name in their lists, its configuration, and where it came from."""

import json
import os
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from sft.config import arguments
from sft.runs.metric import find
from sft.runs.plain import plain

PLACE = ("trainer.num_nodes", "trainer.devices")  # the batch script's own
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
    except (OSError, ValueError, TypeError):
        return {}


class Extremes:
    """The last value of each metric, and of those that can be better or worse the best. Not of a machine's speed."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def note(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            metric = find(name)
            if metric is not None and not metric.of_machine:
                self.last[name] = value
            if metric is not None and metric.best:
                chosen = min if metric.best == "min" else max
                self.best[name] = chosen(self.best.get(name, value), value)


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
    if not HydraConfig.initialized():
        return []
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        fixed = _fixed(sys.argv[2:])
    elif sweep := os.environ.get("SFT_SWEEP"):
        fixed = _fixed(["-m", *shlex.split(sweep)])
    else:
        return []
    given = [override.lstrip("+").partition("=") for override in HydraConfig.get().overrides.task]
    return [(name, _short(value)) for name, _, value in given if fixed is not None and name not in fixed]


def _fixed(typed: list[str]) -> set[str] | None:
    """Names of the settings that are the same for all runs of a sweep; None where the sweep wasn't typed here."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        settings = OverridesParser.create().parse_overrides(arguments.parse("train", typed).settings)
    except Exception:  # of another program's arguments
        return None
    return {*(each.key_or_group for each in settings if not each.is_sweep_override()), *PLACE}


def _short(value: object) -> str:
    """A number in four digits, as people write it."""
    try:
        number = float(str(value))
    except ValueError:
        return plain(str(value)).strip("\"'")
    return str(value) if len(str(value)) <= 7 else f"{number:.4g}"
