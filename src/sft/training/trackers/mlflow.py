"""MLflow: the same names as in metrics.csv. Its client waits for its server, so another thread calls it."""

import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import DummyLogger, Logger

from sft.runs import answers_file
from sft.runs.answers_file import Answer
from sft.runs.files import write_text
from sft.runs.identity import flatten
from sft.runs.metrics_file import Metrics
from sft.runs.run import MLFLOW_LACKS
from sft.training.log import log
from sft.training.trackers import about
from sft.training.trackers.waiting import line
from sft.training.trackers.wandb_files import SHOWN

# Seconds for which MLflow may hold up a run: to begin its run (a database of its own takes a few), and to end it.
BEGIN, END = 15.0, 15.0
AGAIN = 60.0  # seconds from a failure until MLflow is asked again
MOST = 1000  # values that it takes at once
LOGGED = "mlflow.loggedArtifacts"  # the tag by which MLflow shows a table
QUIET = {  # its client would retry for minutes, print, and count who uses it
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MLflow(Logger):
    """Asked by a thread of its own, one call after the other. After a failure it is asked again, now and then, and what
    it lacks by then comes from the run's folder: what wasn't sent isn't kept in memory."""

    name = "mlflow"
    version = 0

    def __init__(self, folder: Path, config: Mapping[str, Any], make: Callable[[], MLFlowLogger]) -> None:
        super().__init__()
        self.folder, self.config, self.make = folder, config, make
        self.inner: MLFlowLogger | None = None
        self.had: dict[str, int] = {}
        """The last step that MLflow has of each metric."""
        self.status: str | None = None
        self.files = False
        self.fault: str | None = None
        self.lost = False  # what it is asked now, it will find in the folder
        self.calls: Queue[Callable[[], object] | None] = Queue()
        self.settled, self.closing, self.closed = Event(), Event(), Event()
        with suppress(OSError):
            write_text(folder / MLFLOW_LACKS, "started again, the run gives MLflow what it lacks\n")
        self.thread = Thread(target=self._work, daemon=True)
        self.thread.start()
        self.settled.wait(BEGIN)  # a server that needs longer isn't waited for

    def _work(self) -> None:
        while True:
            last = self.closing.is_set()
            try:
                self._begin()
                if self.fault and not last:
                    log("MLflow answers again and has all of this run so far")
                self.fault = None
                self.settled.set()
                while (call := self.calls.get()) is not None:
                    call()
                self._end()
                (self.folder / MLFLOW_LACKS).unlink(missing_ok=True)
                return
            except Exception as error:
                known, self.fault, self.lost = self.fault, line(error), True
                if not (known or self.closing.is_set()):
                    log(f"MLflow failed; the run continues without it, and asks it again later: {self.fault}")
                self.settled.set()
            if last:
                return
            self.closing.wait(AGAIN)
            self.lost = False
            with suppress(Empty):  # what was asked until now is in the folder
                while True:
                    self.calls.get_nowait()
            if self.closing.is_set():
                self.calls.put(None)

    def _begin(self) -> None:
        """Begins the MLflow run, or finds what it has already, and sends what it lacks."""
        self.inner = self.inner or self.make()
        client, identity = self._run()
        write_text(self.folder / "mlflow.id", identity)
        known = client.get_run(identity).data
        self.had = {metric.key: metric.step for metric in known._metric_objs}
        told = about.configuration(self.folder, self.config)
        params = {_legal(name): str(value)[:500] for name, value in flatten(self.config).items()}
        self.inner.log_hyperparams({name: value for name, value in params.items() if name not in known.params})
        for name, value in params.items():  # MLflow refuses another value of a parameter
            if known.params.get(name, value) != value:
                client.set_tag(identity, f"changed.{name}", value)
        client.log_dict(identity, told, "config.json")
        self._send(
            (int(row["step"]), {name: float(value) for name, value in row.items() if name != "step" and value})
            for row in Metrics.read(self.folder / "metrics.csv").rows
        )
        if answers := answers_file.read(self.folder):
            self._send_answers(answers)

    def _end(self) -> None:
        assert self.inner is not None
        client, identity = self._run()
        for name in SHOWN if self.files else ():
            if (self.folder / name).is_file():
                client.log_artifact(identity, str(self.folder / name))
        if self.status:
            self.inner.finalize(self.status)

    def _run(self) -> tuple[Any, str]:
        assert self.inner is not None
        client, identity = self.inner.experiment, self.inner.run_id
        assert identity is not None
        return client, identity

    def _send(self, rows: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Values that MLflow lacks, as many at once as it takes."""
        from mlflow.entities import Metric

        client, identity = self._run()
        now, lacking = int(time.time() * 1000), []
        for step, values in rows:
            for name, value in values.items():
                if step > self.had.get(legal := _legal(name), -1):
                    self.had[legal] = step
                    lacking.append(Metric(legal, value, now, step))
        for start in range(0, len(lacking), MOST):
            client.log_batch(identity, metrics=lacking[start : start + MOST])

    def _send_answers(self, answers: Sequence[Answer]) -> None:
        """A table of all answers so far."""
        client, identity = self._run()
        columns = list(Answer.__annotations__)
        rows = [[answer.get(name) for name in columns] for answer in answers]
        client.log_dict(identity, {"columns": columns, "data": rows}, "samples.json")
        client.set_tag(identity, LOGGED, json.dumps([{"path": "samples.json", "type": "table"}]))

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """They are sent when it begins."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = dict(metrics)
        self._ask(lambda: self._send([(int(step or 0), values)]))

    @rank_zero_only
    def log_answers(self, step: int, answers: list[Answer]) -> None:
        earlier = [answer for answer in answers_file.read(self.folder) if answer["step"] < step]
        self._ask(lambda: self._send_answers([*earlier, *answers]))

    @rank_zero_only
    def log_files(self) -> None:
        self.files = True

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        self.status = status

    def _ask(self, call: Callable[[], object]) -> None:
        if not self.lost:
            self.calls.put(call)

    @rank_zero_only
    def close(self) -> None:
        """Waits until MLflow has all of it, for as long as it may."""
        self.closing.set()
        self.calls.put(None)
        self.thread.join(END)
        self.closed.set()
        if self.thread.is_alive() or self.fault:
            why = self.fault or f"no answer in {END:g} seconds"
            log(f"MLflow hasn't got all of this run, and gets the rest by the same command again: {why}")


def _legal(name: str) -> str:
    return re.sub(r"[^\w/. -]", "_", name, flags=re.ASCII)


def mlflow_logger(
    *,
    run: str,
    folder: Path,
    group: str,
    project: str,
    name: str | None = None,
    config: Mapping[str, Any] | None = None,
    tags: Sequence[str] | str | None = None,
    notes: str | None = None,
    job_type: str | None = None,
    tracking_uri: str | None = None,
) -> Logger:
    """MLflow, at `tracking_uri`, else that of MLFLOW_TRACKING_URI, else a database in the run's folder.

    One MLflow run, however often this run is resumed, with each step once: those that it lacks come from metrics.csv.
    If the server can't be reached the run is trained without it; it gets all once it answers, or when the run is
    started again, finished or not.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return DummyLogger()
    if find_spec("mlflow") is None:
        raise ModuleNotFoundError("pip install mlflow")
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    for noisy in ("alembic", "mlflow", "lightning.pytorch.loggers.mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    own = folder.absolute() / "mlflow"
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    known = folder / "mlflow.id"
    several = [tags] if isinstance(tags, str) else tags or []

    def make() -> MLFlowLogger:
        if not uri:
            own.mkdir(exist_ok=True)
        return MLFlowLogger(
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

    return MLflow(folder, config or {}, make)
