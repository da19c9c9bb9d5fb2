"""A run's name, its folder, and whether it is new, unfinished or finished. The name decides the folder, never
the clock: the same experiment is the same run, wherever it is started again."""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import InstantiationException

from sft.errors import UserError
from sft.runs import events, provenance, watchdog
from sft.runs.failure import NotFinite, cause
from sft.runs.files import unfinished, write_json, write_text
from sft.runs.provenance import now
from sft.runs.signals import Interrupted

# What decides the numbers of a run. Not in it: where it runs, how it is shared out (rule 2) and what is logged.
DECIDING = (
    "seed",
    "epochs",
    "max_steps",
    "global_batch_size",
    "model",
    "adapter",
    "data",
    "optimizer",
    "schedule",
    "trainer.precision",
    "trainer.gradient_clip_val",
)
NOT_DECIDING = (
    "model.attention",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "model.compile",
    "adapter.merge",
    "data.num_workers",
    "data.cache_dir",
    "data.max_lost",
)
# Where the project keeps its own classes and functions decides nothing: each is known by the name that it had when the
# first hash was made of it.
TARGETS = {
    "sft.model.loading": ("ModelSource",),
    "sft.model.adapter": ("Adapter",),
    "sft.data.dataset": ("DataConfig",),
    "sft.data.conversation": ("prompt_response", "messages", "text"),
    "sft.model.optimizer": ("constant", "linear", "cosine", "warmup_stable_decay"),
}


def deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved configuration that decide the numbers, by dotted name."""
    flat = _flatten(config)
    return {
        name: _first_name(value) if name.endswith("._target_") else value
        for name, value in sorted(flat.items())
        if _within(name, DECIDING) and not _within(name, NOT_DECIDING)
    }


def _first_name(target: str) -> str:
    """Of what a `_target_` names; a user's own, outside of this package, is known by its own name."""
    package, _, name = target.rpartition(".")
    modules = [module for module, names in TARGETS.items() if name in names and package.startswith("sft.")]
    return f"{modules[0]}.{name}" if modules else target


def identity(config: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits of all that decides the numbers."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()[:8]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)


@dataclass(frozen=True)
class Run:
    """A run's folder. `status.json` in it says `running`, `finished`, `interrupted` or `failed`, and at which step."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    def exported(self) -> Path:
        """The exported model's folder; `UserError` where there is none yet."""
        if not (self.export / "verified.json").exists():
            raise UserError(
                f"{self.folder} has no exported model: let sft train finish, or sft export run={self.folder.name}"
            )
        return self.export

    @property
    def status(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / "status.json").read_text())
        except FileNotFoundError:
            return {}

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "config.yaml").read_text())

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Run":
        """The run that a resolved configuration names; a folder of other numbers is refused."""
        name = str(config["run"] or f"{config['name']}-{identity(config)}")  # run=5 is a number to Hydra
        run = cls(Path(config["runs_dir"]) / name)
        found = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
        if "config.yaml" in found:
            before, now = deciding(run.config), deciding(json.loads(json.dumps(config)))
            differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            if differing:
                key = differing[0]
                raise UserError(
                    f"{run.folder} is a run with {key}={before.get(key)}, not {now.get(key)}"
                    + (f" ({len(differing) - 1} more differ)" if len(differing) > 1 else "")
                    + ": give this one another name with run=NAME"
                )
        # Another rank may be making it at this moment: config.yaml is the first in it, under another name at first.
        elif found - {"logs", "events.jsonl", unfinished(run.folder / "config.yaml").name}:
            raise UserError(f"{run.folder} exists and is no run: move it away, or give the run a name with run=NAME")
        existing = nearest_existing(run.folder)
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UserError(f"{run.folder} can't be written, since {existing} can't: set runs_dir to another folder")
        return run

    @classmethod
    def find(cls, name: str | None, runs_dir: str) -> "Run":
        """An existing run by its folder or its name in `runs_dir`."""
        if not name:
            raise UserError(f"no run is named: set run=NAME, one of {_listed(runs_dir)}")
        for folder in (Path(name).expanduser(), Path(runs_dir) / name):
            if (folder / "config.yaml").exists():
                return cls(folder)
        raise UserError(f"there is no run {name}: in {runs_dir}/ there are {_listed(runs_dir)}")

    @contextmanager
    def attempt(
        self, config: Mapping[str, Any], data_fingerprint: Mapping[str, str], num_steps: int, main: bool
    ) -> Iterator[None]:
        """Works on the run: `status.json` says so, and afterwards how it went. Only the first rank (`main`) writes.

        `UserError` where another process works on it or its data has changed. A folder that this attempt made is
        removed again where a user's mistake ends it before there is a checkpoint.
        """
        if not main:
            yield
            return
        status = self.status
        process = _process(status["pid"]) if status.get("state") == "running" else None
        if process and process == status["process"] and status["pid"] != os.getpid():
            raise UserError(
                f"{self.folder} is being trained by process {status['pid']} of this machine: wait for it or stop it"
            )
        recorded = self.folder / "provenance.json"
        if recorded.exists() and json.loads(recorded.read_text())["data"] != dict(data_fingerprint):
            raise UserError(
                f"the data has changed since {self.folder} was begun, so it can't go on as the same run: "
                "put the data back, or start another with run=NAME"
            )
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        if not recorded.exists():
            write_json(recorded, provenance.collect() | {"data": dict(data_fingerprint)})
        self._mark("running", num_steps=num_steps, step=self._step())
        try:
            yield
        except Interrupted:
            self._mark("interrupted", num_steps=num_steps, step=self._step())
            raise
        except BaseException as error:
            mistake = isinstance(error, UserError | InstantiationException) and not isinstance(error, NotFinite)
            if new and mistake and not self.checkpoints.exists():
                shutil.rmtree(self.folder)
            else:
                reason = f"{type(error).__name__}: {error}"[:2000]
                with suppress(OSError):  # a full disk must not hide what filled it
                    self._mark("failed", num_steps=num_steps, step=self._step(), error=reason)
                if "SFT_JOB_FOLDER" not in os.environ:  # else the batch script tells, which knows of all ranks
                    events.record(self.folder, "failure", cause=cause(error), step=watchdog.step, error=reason)
            raise
        self._mark("finished", num_steps=num_steps, step=self._step())
        events.record(self.folder, "finish", step=self._step())

    def _step(self) -> int:
        """Of the newest checkpoint."""
        return max((int(path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*")), default=0)

    def _mark(self, state: str, **details: Any) -> None:
        """Writes `status.json`."""
        write_json(
            self.folder / "status.json",
            {
                "state": state,
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process": _process(os.getpid()),
                "time": now(),
                **details,
            },
        )


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _listed(runs_dir: str) -> str:
    names = sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none yet"


def _process(pid: int) -> str | None:
    """What tells a live process from all that ever had its number; None where there is none (or no /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # A killed process that its parent hasn't asked after yet is a zombie and still listed.
    return None if fields[0] == "Z" else f"{boot} {pid} {fields[19]}"
