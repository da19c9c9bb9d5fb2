"""Which of a run's files W&B gets, as artefacts linked to the run, and how long their upload may take."""

import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.checkpoint.checkpoint import best, complete
from sft.errors import UserError
from sft.training.trackers import wandb_server
from sft.training.trackers.waiting import bounded, line

SHOWN = ("preview.html", "data.json", "report.html", "samples.jsonl", "recipe.json", "events.jsonl")
SEND = 10.0  # seconds in which wandb must take an artefact
UPLOAD = 1800.0  # seconds for the upload of weights, while the server answers
POLL = 5  # seconds between two looks at whether it does
MODES = ("none", "reference", "upload")
FULL = ("no space left on device", "disk quota exceeded")  # as Go says it
PLACES = ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")


class Files:
    """`model`: whether W&B gets checkpoints and export: `none`; `reference`: where they are, with checksums; `upload`:
    the files."""

    def __init__(self, folder: Path, model: str, online: bool, settings: Any, key: str | None) -> None:
        if model not in MODES:
            raise UserError(f"logger.log_model={model} is not one of {', '.join(MODES)}")
        self.folder, self.model, self.online, self.settings, self.key = folder, model, online, settings, key

    def log(self, run: Any, step: int) -> None:
        import wandb

        if self.online and (fault := wandb_server.fault(self.settings, self.key)):
            raise RuntimeError(fault)
        with staging(self.folder):
            shown = [self.folder / name for name in SHOWN if (self.folder / name).is_file()]
            artefact = wandb.Artifact(_name(run.id, "files"), type="run", metadata={"step": step})
            for file in shown:
                artefact.add_file(str(file), skip_cache=True)  # a copy: the folder's own is written again
            if shown:
                self._send(run, artefact, [f"step-{step}"])
            if self.model != "none":
                for kind, path, aliases in self._weights():
                    self._log_weights(run, wandb.Artifact(_name(run.id, kind), type=kind), path, aliases)

    def _weights(self) -> Iterator[tuple[str, Path, list[str]]]:
        """Kind, folder and aliases of what the run has of weights, the oldest checkpoint first."""
        checkpoints = complete(self.folder / "checkpoints")
        lowest = best(checkpoints)

        def aliases(step: int | None) -> list[str]:
            named = {"best": lowest and lowest.step, "last": checkpoints and checkpoints[-1].step}
            return [f"step-{step}", *(name for name, of_name in named.items() if of_name == step)]

        for checkpoint in checkpoints:
            yield "checkpoint", checkpoint.path, aliases(checkpoint.step)
        verified = self.folder / "export" / "verified.json"
        if verified.is_file():
            yield "model", verified.parent, aliases(json.loads(verified.read_text()).get("step"))

    def _send(self, run: Any, artefact: Any, aliases: list[str]) -> Any:
        """Gives it to wandb, which asks its server about it in this call."""
        return bounded(SEND, lambda: run.log_artifact(artefact, aliases=aliases))

    def _log_weights(self, run: Any, artefact: Any, path: Path, aliases: list[str]) -> None:
        if self.model == "reference":
            artefact.add_reference(path.absolute().as_uri(), checksum=True)
            self._send(run, artefact, aliases)
            return
        artefact.add_dir(str(path), policy="immutable", skip_cache=True)
        logged = self._send(run, artefact, aliases)
        end = time.monotonic() + UPLOAD
        while self.online:
            try:
                logged.wait(timeout=POLL)
                return
            except Exception as error:
                fault = wandb_server.fault(self.settings, self.key)
                if "Timeout" not in type(error).__name__ or fault or time.monotonic() > end:
                    raise RuntimeError(fault or line(error)) from error


def _name(identity: str, part: str) -> str:
    """W&B's names of artefacts are of letters, digits, _ - and ."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', identity)[:110]}-{part}"


def was_full(folder: Path) -> bool:
    """Whether the disk of a W&B run's folder is full or was: wandb's own process says so in its log alone, which a disk
    without any room lacks, too."""
    told = folder / "logs" / "debug-internal.log"
    text = told.read_text(errors="replace") if told.is_file() else ""
    return os.statvfs(folder).f_bavail == 0 or any(reason in text for reason in FULL)


@contextmanager
def staging(folder: Path) -> Iterator[None]:
    """wandb's copies and checksums in the run's folder: a home may be small, or not to be written to."""
    own = {name: str(folder.absolute() / "wandb" / "staging") for name in PLACES if name not in os.environ}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            os.environ.pop(name, None)
