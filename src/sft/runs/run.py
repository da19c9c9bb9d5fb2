"""A run's name, its folder, and whether it is new, unfinished or finished. The name decides the folder, never the
clock: the same experiment is the same run, wherever it is started again."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TypedDict, cast

from hydra.errors import InstantiationException

from sft.config.check import shown
from sft.errors import NotFinite, UserError, by_hand
from sft.runs import config_file, events, lease, manifest, provenance, saved, watchdog
from sft.runs.failure import cause
from sft.runs.files import TRIAL, check_writable, unfinished
from sft.runs.identity import TODAY, Config, deciding, identity
from sft.runs.manifest import Damaged
from sft.runs.process import live_process
from sft.runs.provenance import now
from sft.runs.secrets import redacted, without_secrets
from sft.runs.signals import Interrupted

# In a run's folder while MLflow or W&B lacks something of it that the same command gives it.
MLFLOW_LACKS, WANDB_LACKS = "mlflow.unsent", "wandb.unsent"


class Status(TypedDict, total=False):
    """`status.json`: empty before a run's first attempt."""

    state: str  # running, finished, interrupted or failed
    step: int  # of the newest checkpoint
    num_steps: int
    host: str
    pid: int
    process: str | None  # which tells the process from others that had the same pid
    time: str
    error: str
    stopped_early: str  # of a finished run: which callback ended it before its last step, and why
    exported: int  # of a finished run: the step that it has exported


KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "num_steps", "pid", "exported"), (int,)),
    **dict.fromkeys(("state", "host", "time", "error", "stopped_early"), (str,)),
    "process": (str, NoneType),
}


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def export(self) -> Path:
        return self.folder / "export"

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints, ascending."""
        return [*saved.folders(self.checkpoints)]

    def check_step(self, which: str) -> None:
        """UserError unless there is a checkpoint of this step, or it is asked for as `last` or `best` of some."""
        if not self.steps:
            raise UserError(f"{self.folder} has no checkpoint yet: let sft train continue")
        if which not in ("last", "best", *map(str, self.steps)):
            steps = ", ".join(map(str, self.steps))
            raise UserError(f"checkpoint={which} is not there: set last, best or a step, one of {steps}")

    def exported(self) -> Path:
        """The folder of the exported model; UserError where there is none yet."""
        if not (self.export / "verified.json").exists():
            raise UserError(
                f"{self.folder} has no exported model: let sft train finish, or sft export run={self.folder.name}"
            )
        return self.export

    def check_export(self) -> None:
        """UserError for an exported model whose files aren't those that were proven; reads all of them."""
        advice = f"write it again with sft export run={self.folder.name}, or put back a copy"
        files = self.exported_files(advice)
        if files is None:
            print(f"note: {self.export} is from before there were checksums: it isn't compared", file=sys.stderr)
        elif wrong := manifest.faults(self.export, files):
            raise Damaged(wrong[0], advice)

    def exported_files(self, advice: str) -> manifest.Manifest | None:
        """The manifest of the exported model; None where the run is from before there were any."""
        files = manifest.read(self.export, advice)
        if files is None and config_file.has_checksum(self.folder):
            raise Damaged(f"{self.export / manifest.NAME} is missing", advice)
        return files

    @property
    def status(self) -> Status:
        """As `status.json` has it; `unreadable` where that isn't what was written: it says nothing that checkpoints
        don't."""
        try:
            found = manifest.read_sealed(self.folder / "status.json", "sft train writes it again")
        except FileNotFoundError:
            return {}
        except Damaged as error:
            return {"state": "unreadable", "error": str(error)}
        odd = [name for name, value in found.items() if name in KINDS and type(value) not in KINDS[name]]
        if odd:
            what = f"{self.folder / 'status.json'} is damaged ({odd[0]}={found[odd[0]]!r})"
            return {"state": "unreadable", "error": f"{what}: sft train writes it again"}
        return cast(Status, found)

    @property
    def config(self) -> Config:
        """The resolved configuration; Damaged where `config.yaml` isn't what was written."""
        return config_file.read(self.folder)

    @property
    def day(self) -> str | None:
        """The day it was begun, YYYY-MM-DD, which a chat template that writes the date sees; None until then."""
        recorded = provenance.recorded(self.folder)
        # Runs begun before it was kept lack it.
        return str(recorded.get("today") or str(recorded["started"])[:10]) if recorded else None

    @classmethod
    def named(cls, config: Config) -> "Run":
        """The run that a resolved configuration names, whether or not it is there."""
        name = str(config["run"] or f"{config['name']}-{identity(config)}")  # run=5 is a number to Hydra
        return cls(Path(config["runs_dir"]) / name)

    @classmethod
    def of(cls, config: Config) -> "Run":
        """The run that a resolved configuration names. UserError where its folder can't be written or holds anything
        else: a run with other numbers, or no run at all."""
        run = cls.named(config)
        # Another rank may be making the folder right now, or trying whether it can be written: its first file is
        # config.yaml, not yet under that name.
        begun = {"logs", "events.jsonl", unfinished(run.folder / "config.yaml").name}
        names = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
        strange = [name for name in names - begun if not name.startswith(TRIAL)]
        if (run.folder / "config.yaml").exists():
            now = deciding(without_secrets(json.loads(json.dumps(config))))
            try:
                before = deciding(without_secrets(run.config))
            except Damaged:  # an attempt writes it again, if it is the same run
                if provenance.recorded(run.folder).get("identity") != identity(without_secrets(config)):
                    raise
                before = now
            differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
            if differing:
                key = differing[0]
                raise UserError(
                    f"{run.folder} is a run with {key}={shown(before.get(key))}, not {shown(now.get(key))}"
                    + (f" ({len(differing) - 1} more differ)" if len(differing) > 1 else "")
                    + ": give this one another name with run=NAME"
                )
        elif strange:
            raise UserError(f"{run.folder} exists and is not a run: move it away, or name the run with run=NAME")
        check_writable(run.folder, "runs_dir")
        return run

    @classmethod
    def find(cls, name: str | None, runs_dir: str) -> "Run":
        """An existing run by its folder or its name in `runs_dir`."""
        if not name:
            raise UserError(f"no run is named: set run=NAME ({runs_dir}/ holds {_listed(runs_dir)})")
        for folder in (Path(name).expanduser(), Path(runs_dir) / name):
            if (folder / "config.yaml").exists():
                return cls(folder)
        looked = "" if Path(runs_dir).is_absolute() else f" (looked in {Path.cwd()})"
        raise UserError(f"there is no run {name}: {runs_dir}/ holds {_listed(runs_dir)}{looked}")

    @property
    def model(self) -> dict[str, dict[str, str]]:
        """The fingerprint of the model's files when it began; empty for a run begun before there was one."""
        return provenance.recorded(self.folder).get("model") or {}  # type: ignore[return-value]

    def check_model(self, now: Mapping[str, Mapping[str, str]]) -> None:
        """UserError for files of the model that have changed since the run began; `now` has the parts to compare."""
        for part, before in self.model.items():
            changed = [name for name in sorted(before.keys() | now.get(part, {}).keys()) if part in now]
            changed = [name for name in changed if before.get(name) != now[part].get(name)]
            if not changed:
                continue
            names = ", ".join(Path(name).name for name in changed[:3]) + (", ..." if len(changed) > 3 else "")
            if part == "template":
                what = "the chat template has changed"
            else:
                place = Path(changed[0]).parent if Path(changed[0]).is_absolute() else changed[0]
                what = f"the {part} in {place} {'have' if part == 'weights' else 'has'} changed"
            raise UserError(
                f"{what} since {self.folder} began"
                + ("" if part == "template" else f" ({names})")
                + ": put back what was there, or start another run with run=NAME"
            )

    @contextmanager
    def attempt(
        self,
        config: Config,
        data_fingerprint: Mapping[str, str],
        num_steps: int,
        main: bool,
        template: Mapping[str, object] | None = None,
        model: Mapping[str, Mapping[str, str]] | None = None,
        seen: lease.Seen | None = None,
    ) -> Iterator[Status]:
        """An attempt to train the run: `status.json` says that it is running, and afterwards how it ended, with what
        the yielded status has got by then if the run is finished. Only the first rank (`main`) writes. `template`: what
        the chat template is rendered with, of which the day is kept. `model`: fingerprint of the model's files. `seen`:
        the run's lease when its checkpoints were looked for.

        UserError where another process is training the run or has since it was `seen`, or its data or its model has
        changed. If a user's mistake ends the attempt before the first checkpoint, a folder that the attempt has made is
        removed.
        """
        if not main:
            yield {}
            return
        new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        lease.take(self.folder, seen)
        try:
            with self._leased(config, data_fingerprint, num_steps, template, model, new) as finished:
                yield finished
        finally:
            lease.give_back()

    @contextmanager
    def _leased(
        self,
        config: Config,
        data_fingerprint: Mapping[str, str],
        num_steps: int,
        template: Mapping[str, object] | None,
        model: Mapping[str, Mapping[str, str]] | None,
        new: bool,
    ) -> Iterator[Status]:
        """The same, once the run is this process's alone. `new`: so is its folder."""
        finished: Status = {}
        recorded = provenance.recorded(self.folder)
        if recorded and recorded["data"] != dict(data_fingerprint):
            raise UserError(
                f"the data has changed since {self.folder} began, so the run can't be resumed: put the data back, or "
                "start another run with run=NAME"
            )
        self.check_model(model or {})
        self.mend(config)
        if not recorded:
            today = {TODAY: template[TODAY]} if template and TODAY in template else {}
            of_run = {"data": dict(data_fingerprint), "model": dict(model or {})}
            own = {"identity": identity(without_secrets(config))}
            provenance.write(self.folder, {**provenance.collect(config), **today, **of_run, **own})
        self._mark("running", num_steps)
        try:
            yield finished
            lease.check()
        except Interrupted:
            self._mark("interrupted", num_steps)
            raise
        except BaseException as error:
            if lease.is_lost():  # and what the folder says is another's
                raise
            if by_hand(error):
                self._mark("interrupted", num_steps)
                raise
            mistake = isinstance(error, UserError | InstantiationException) and not isinstance(error, NotFinite)
            if new and mistake and not self.checkpoints.exists():
                shutil.rmtree(self.folder)
            else:
                reason = redacted(f"{type(error).__name__}: {error}"[:2000], config)
                with suppress(OSError):  # a full disk must not hide what filled it
                    self._mark("failed", num_steps, {"error": reason})
                if "SFT_JOB_FOLDER" not in os.environ:  # else the batch script records it: it knows of all ranks
                    events.record(self.folder, "failure", cause=cause(error), step=watchdog.step, error=reason)
            raise
        self._mark("finished", num_steps, finished)
        events.record(self.folder, "finish", step=self._step())

    def mend(self, config: Config) -> None:
        """Writes `config.yaml`, and says what of it and of `status.json` was damaged."""
        lost = [self.status["error"]] if self.status.get("state") == "unreadable" else []
        try:
            if (self.folder / "config.yaml").exists():
                config_file.read(self.folder)
        except Damaged as error:
            lost.append(f"{error.what}: written again")
        config_file.write(self.folder, without_secrets(dict(config)))
        for what in lost:
            print(f"note: {what}", flush=True)
            events.record(self.folder, "mended", why=what)

    def _step(self) -> int:
        """Of the newest checkpoint."""
        return max(self.steps, default=0)

    def _mark(self, state: str, num_steps: int, details: Status | None = None) -> None:
        """Writes `status.json`, unless the run is another process's by now."""
        if lease.is_lost():
            return
        status: Status = {
            "state": state,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "process": live_process(os.getpid()),
            "time": now(),
            "num_steps": num_steps,
            "step": self._step(),
        }
        manifest.write_sealed(self.folder / "status.json", status | (details or {}))


def _listed(runs_dir: str) -> str:
    names = sorted(path.parent.name for path in Path(runs_dir).glob("*/config.yaml"))
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "none yet"
