"""MLflow: the same names as in metrics.csv. Its client waits for its server, so another thread calls it."""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger

from sft.runs.answers_file import Answer
from sft.runs.files import write_text
from sft.runs.identity import flatten
from sft.training.log import log
from sft.training.trackers import about
from sft.training.trackers.waiting import bounded, line
from sft.training.trackers.wandb_files import SHOWN

# Seconds for which MLflow may hold up a run: to begin its run (a database of its own takes a few), and to end it.
BEGIN, END = 30.0, 15.0
QUIET = {  # its client would retry for minutes, print, and count who uses it
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MLflow(MLFlowLogger):
    """Lightning's, asked by a thread of its own, one call after the other."""

    def __init__(self, folder: Path, config: Mapping[str, Any], **options: Any) -> None:
        super().__init__(**options)
        self.folder, self.config, self.first = folder, config, 0
        self.calls: Queue[Callable[[], object] | None] = Queue()
        self.thread = Thread(target=self._work, daemon=True)
        self.fault: str | None = None

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            try:
                if not self.fault:
                    call()
            except Exception as error:
                self.fault = line(error)
                log(f"MLflow failed; the run continues without it until it is resumed: {self.fault}")

    def begin(self) -> None:
        """Begins the MLflow run, or finds which steps it has already."""
        client, identity = self.experiment, self.run_id
        assert identity is not None
        write_text(self.folder / "mlflow.id", identity)
        steps = [metric.step for metric in client.get_metric_history(identity, "train/loss")]
        self.first = max(steps, default=-1) + 1
        told = about.configuration(self.folder, self.config)
        params = {_legal(name): str(value)[:500] for name, value in flatten(self.config).items()}
        had = client.get_run(identity).data.params
        new = {name: value for name, value in params.items() if name not in had}
        self.log_hyperparams(new)
        for name, value in params.items():  # MLflow refuses another value of a parameter
            if had.get(name, value) != value:
                client.set_tag(identity, f"changed.{name}", value)
        client.log_dict(identity, told, "config.json")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if int(step or 0) >= self.first:
            values = {_legal(name): value for name, value in metrics.items()}
            self.calls.put(lambda: super(MLflow, self).log_metrics(values, step))

    @rank_zero_only
    def log_answers(self, step: int, answers: list[Answer]) -> None:
        columns = {name: [answer[name] for answer in answers] for name in Answer.__annotations__}  # type: ignore[literal-required]
        if step >= self.first:
            self.calls.put(lambda: self.experiment.log_table(self.run_id, columns, "samples.json"))

    @rank_zero_only
    def log_files(self) -> None:
        for name in SHOWN:
            if (self.folder / name).is_file():
                self.calls.put(partial(self._log_file, str(self.folder / name)))

    def _log_file(self, path: str) -> None:
        self.experiment.log_artifact(self.run_id, path)

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self.calls.put(lambda: super(MLflow, self).finalize(status))

    @rank_zero_only
    def close(self) -> None:
        """Waits until MLflow has all of it, for as long as it may."""
        self.calls.put(None)
        self.thread.join(END)
        if self.thread.is_alive():
            self.fault = "its server doesn't answer"
            log(f"MLflow hasn't got all of this run: {self.fault}")
            while True:
                try:
                    self.calls.get_nowait()
                except Empty:
                    break


def _legal(name: str) -> str:
    return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)


def mlflow_logger(
    *,
    run: str,
    folder: Path,
    group: str,
    history: Sequence[Mapping[str, str]],
    project: str,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] | str | None = None,
    notes: str | None = None,
    job_type: str | None = None,
    tracking_uri: str | None = None,
) -> Logger:
    """MLflow, at `tracking_uri`, else that of MLFLOW_TRACKING_URI, else a database in the run's folder.

    One MLflow run, however often this run is resumed, with each step once: those that it lacks come from `history`, the
    rows of metrics.csv. If the server can't be reached the run is trained without it, and started again it gets all.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return DummyLogger()
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for noisy in ("alembic", "mlflow", "lightning.pytorch.loggers.mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    own = folder.absolute() / "mlflow"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        own.mkdir(exist_ok=True)
    known = folder / "mlflow.id"
    several = [tags] if isinstance(tags, str) else tags or []
    logger = MLflow(
        folder,
        config or {},
        experiment_name=project,
        run_name=name or run,
        tracking_uri=uri or f"sqlite:///{own}/mlflow.db",
        artifact_location=None if uri else (own / "artifacts").as_uri(),
        run_id=known.read_text() if known.is_file() else None,
        tags={
            **{"run": run, "group": group, "job_type": job_type or "train"},
            **{str(tag): "" for tag in several},
            **({"mlflow.note.content": notes} if notes else {}),
        },
    )
    try:
        bounded(BEGIN, logger.begin)
    except Exception as error:
        log(f"MLflow can't be used; the run continues without it until it is resumed: {line(error)}")
        return DummyLogger()
    logger.thread.start()
    for row in history:
        values = {column: float(value) for column, value in row.items() if column != "step" and value}
        logger.log_metrics(values, step=int(row["step"]))
    return logger
