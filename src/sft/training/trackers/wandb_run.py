"""Weights & Biases: one W&B run for a run, however often it is resumed, with each step exactly once."""

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger

from sft.errors import UserError
from sft.runs import answers_file
from sft.runs.answers_file import Answer
from sft.runs.files import write_json, write_text
from sft.runs.metric import METRICS, find
from sft.runs.run import WANDB_LACKS
from sft.runs.secrets import redacted
from sft.runs.signals import shielded
from sft.training.log import log
from sft.training.trackers import about, wandb_server
from sft.training.trackers.waiting import bounded, line
from sft.training.trackers.wandb_files import Files, staging

# Seconds for which W&B may hold up a run: to begin its run once it has answered, and to end it.
BEGIN, END = 6.0, 15.0
STEP = "trainer/global_step"
ROWS = 1000  # of the table of answers: the newest
COLUMNS = {  # of that table, and what they are called in samples.jsonl
    **{name: name for name in ("step", "prompt", "reference", "base", "answer", "score")},
    **{"length": "num_tokens", "stopped": "stopped"},
}


class WandbRun(WandbLogger):
    """A W&B run that has begun. Steps that it has already are left out."""

    def __init__(self, experiment: Any, folder: Path, config: Mapping[str, Any], files: Files) -> None:
        super().__init__(experiment=experiment)
        self.run, self.folder, self.config, self.files = experiment, folder, config, files
        self.first, self.last = experiment.starting_step, 0
        self.extremes = about.Extremes()
        self.begun, self.looks, self.tables = time.time(), 10, True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.last = max(self.last, int(step or 0))
        self.extremes.note(metrics)
        if int(step or 0) >= self.first:
            self.run.log({**metrics, STEP: step}, step=step)
        if self.looks:
            self._log_recipe()

    @rank_zero_only
    def log_answers(self, step: int, answers: list[Answer]) -> None:
        """A table of all answers so far. W&B keeps the tables of earlier steps, too."""
        import wandb

        if step < self.first or not self.tables:
            return
        earlier = [answer for answer in answers_file.read(self.folder) if answer["step"] < step]
        rows = [[answer[name] for name in COLUMNS.values()] for answer in (*earlier, *answers)]  # type: ignore[literal-required]
        table = wandb.Table(list(COLUMNS), rows[-ROWS:])
        try:
            with staging(self.folder):  # wandb asks its server about a table, in this call
                bounded(BEGIN, lambda: self.run.log({"samples": table, STEP: step}, step=step))
        except TimeoutError as error:
            self.tables = False
            log(f"W&B gets no more answers until the run is resumed: {line(error)}")

    @rank_zero_only
    def log_files(self) -> None:
        """What the run's folder holds at its end, as artefacts."""
        self.looks = 1
        self._log_recipe()
        self.files.log(self.run, self.last)

    @rank_zero_only
    def alert(self, title: str, text: str) -> None:
        """A message to whoever follows the run, by e-mail or Slack as they have set it at W&B."""
        self.run.alert(title=title[:63], text=text, level="WARN")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """The best of all steps: wandb knows of those since it was started. `choose.tracking` ends the W&B run."""
        if self.last >= self.first:
            self.run.log({}, step=self.last, commit=True)  # the last step is given on before
        for name, best in self.extremes.best.items():
            if _has_best(name):
                which = find(name)
                self.run.summary[name] = {which.best: best, "last": self.extremes.last[name]}  # type: ignore[union-attr]

    def _log_recipe(self) -> None:
        """The recipe as it is: it is in the run's folder once the model is there."""
        file = self.folder / "recipe.json"
        self.looks -= 1
        if file.is_file() and (file.stat().st_mtime >= self.begun or not self.looks):
            self.looks = 0
            self.run.config.update(about.configuration(self.folder, self.config), allow_val_change=True)


def wandb_logger(
    *,
    run: str,
    folder: Path,
    group: str,
    history: Sequence[Mapping[str, str]],
    project: str,
    mode: str,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    entity: str | None = None,
    tags: Sequence[str] | str | None = None,
    notes: str | None = None,
    job_type: str | None = None,
    log_model: str = "none",
) -> WandbLogger:
    """Weights & Biases; `mode=auto` is online if wandb finds a key, unless `wandb offline` was called, else offline.

    One W&B run, however often this run is resumed, with each step exactly once; a folder that is begun anew is another
    W&B run. A resumed run repeats the steps after its checkpoint, to the same bits: online, steps that W&B has already
    are left out. An offline W&B run can't be resumed, so it is written anew. Steps that W&B lacks come from `history`,
    the rows of metrics.csv. `config` is the W&B run's configuration, with what the run's folder says of code, data and
    ranks; the latest start's values count. `name` is what W&B shows.

    `WANDB_MODE` in the environment takes precedence over `mode`, and under W&B's agent so does its run's id. If the
    server can't be reached or refuses the key, the run is logged offline until it is started again. Raises UserError if
    `mode=online` without a key, and if wandb refuses its own settings or those given here.
    """
    mode = os.environ.get("WANDB_MODE") or mode
    first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first_rank or mode == "online":
        try:
            settings = wandb_server.settings()
            key = wandb_server.find_key(settings) if mode in ("auto", "online") else None
        except Exception as error:
            raise UserError(f"wandb's settings are wrong, correct them or set logger=csv: {line(error)}") from error
        if mode == "auto":
            mode = settings.mode if key or settings.mode != "online" else "offline"
        elif mode == "online" and not key:
            raise UserError("logger.mode=online needs a W&B key: run `wandb login`, or set logger.mode=offline")
    if not first_rank:
        return WandbLogger(offline=True)  # a dummy: only the first rank logs

    import wandb

    identity = _identity(folder, run)
    own = folder.absolute() / "wandb"
    told = about.configuration(folder, config or {})

    def start(mode: str) -> wandb.Run:
        # The console in parts: to a single one W&B can't append when the run is resumed.
        options: dict[str, Any] = {"silent": True, "init_timeout": BEGIN, "console": "off"}
        known = wandb.Settings.model_fields
        if "console_multipart" in known:
            options |= {"console": "wrap", "console_multipart": True}
        if "console_chunk_max_seconds" in known:
            options |= {"console_chunk_max_seconds": 300}
        # Offline nothing is waited for but the disk. Older versions decide by themselves.
        if mode == "online" and "finish_timeout" in known:
            options |= {"finish_timeout": END, "finish_timeout_raises": True}
        with shielded(), _typed():  # W&B's own process
            return wandb.init(
                project=project,
                entity=entity,
                name=name or run,
                group=group,
                job_type=job_type,
                tags=[tags] if isinstance(tags, str) else tags and [str(tag) for tag in tags],
                notes=notes,
                config=dict(told),
                id=identity,
                resume="allow",
                dir=str(folder.absolute()),  # its process may have another working folder
                mode=mode,  # type: ignore[arg-type]
                settings=options,
            )

    def forget() -> None:
        """What an earlier start has logged offline: `history` has all of it."""
        for earlier in own.glob("offline-run-*"):
            shutil.rmtree(earlier)

    if mode == "online":
        fault = wandb_server.fault(settings, key)
        try:
            if not fault:
                experiment = start(mode)
                forget()
                log(f"W&B run {experiment.url}")
        except Exception as error:  # whatever it is: the run can be logged offline
            fault = f"{settings.base_url}: {line(error)}"
            wandb_server.leave()  # its process would still have this run's id in use
            wandb_server.settings()
        if fault:
            log(f"W&B can't be used, so this run is logged offline until it is started again: {fault}")
            mode = "offline"
    if mode != "online":
        if mode == "offline":
            forget()
        try:
            experiment = start(mode)
        except (ValueError, wandb.errors.UsageError) as error:
            raise UserError(f"wandb refuses the settings of logger: {line(error)}") from error
    if mode == "online":
        place = {"entity": experiment.entity, "project": experiment.project, "run": identity}
        write_json(own / "online.json", place)
    else:
        (own / "online.json").unlink(missing_ok=True)
    (folder / WANDB_LACKS).unlink(missing_ok=True)
    experiment.config.update(told, allow_val_change=True)  # a resumed W&B run keeps the earlier values
    _define(experiment)
    files = Files(folder, log_model, mode == "online", settings, key)
    logger = WandbRun(experiment, folder, config or {}, files)
    for row in history:
        values = {column: float(value) for column, value in row.items() if column != "step" and value}
        logger.log_metrics(values, step=int(row["step"]))
    logger.looks = 10
    return logger


@contextmanager
def _typed() -> Iterator[None]:
    """W&B keeps the command line as it finds it."""
    typed = sys.argv
    sys.argv = [redacted(word) for word in typed]
    try:
        yield
    finally:
        sys.argv = typed


def _define(experiment: Any) -> None:
    """The steps as the x-axis, and of each metric that has one the best value beside the last. W&B's controller of
    sweeps compares last values: there val/loss stays a number."""
    experiment.define_metric(STEP)
    experiment.define_metric("*", step_metric=STEP)
    for metric in METRICS:
        if _has_best(metric.name):
            name = re.sub(r"\{.*", "*", metric.name)
            experiment.define_metric(name, step_metric=STEP, summary=f"{metric.best},last")


def _has_best(name: str) -> bool:
    metric = find(name)
    return bool(metric and metric.best) and not (name == "val/loss" and "WANDB_SWEEP_ID" in os.environ)


def _identity(folder: Path, run: str) -> str:
    """The W&B run's id, kept in the run's folder. W&B never takes the id of a removed run again, and two people may
    give their runs one name. W&B's agent has an id of its own for each run of its sweep."""
    file = folder / "wandb" / "id"
    if "WANDB_SWEEP_ID" in os.environ and (given := os.environ.get("WANDB_RUN_ID")):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, given)
        return given
    if file.is_file():
        return file.read_text()
    identity = f"{run[:119]}-{secrets.token_hex(4)}"  # W&B takes 128 characters
    if file.parent.is_dir():  # by a run begun when the id was the name
        identity = run if len(run) <= 128 else f"{run[:119]}-{sha256(run.encode()).hexdigest()[:8]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, identity)
    return identity
