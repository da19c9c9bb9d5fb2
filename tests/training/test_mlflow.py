"""MLflow, whose real server is asked through a stand-in that fails: it gets all of a run in the end, and holds up
nothing until then."""

import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from offline import ANSWER
from running import Sft
from sft.runs import answers_file
from sft.runs.metrics_file import Metrics
from sft.runs.run import MLFLOW_LACKS
from sft.training.metrics_file import MetricsFile
from sft.training.trackers import choose, mlflow
from sft.training.trackers.guard import guarded

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's of its own parts
SERVER = """
import os
from mlflow.server import app
from mlflow.server.handlers import initialize_backend_stores
from werkzeug.serving import make_server
initialize_backend_stores(os.environ["_MLFLOW_SERVER_FILE_STORE"])
server = make_server("127.0.0.1", 0, app, threaded=True)
print(server.server_port, flush=True)
server.serve_forever()
"""
STEPS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def mlflow_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """MLflow's own server, with a database in the tests' folder; where it listens."""
    folder = tmp_path_factory.mktemp("mlflow")
    places = {
        "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{folder}/mlflow.db",
        "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
        "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(folder / "artifacts"),
        "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER], env=os.environ | places, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert server.stdout is not None
    port = int(server.stdout.readline())
    first = HTTPConnection("127.0.0.1", port)  # takes longer than others
    first.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0")
    assert first.getresponse().status == 200
    first.close()
    yield port
    server.kill()
    server.wait()
    server.stdout.close()


class Between(ThreadingHTTPServer):
    """Gives on what it is asked. From the first request that contains `at` it fails: it hangs (`fault="hang"`), breaks
    off (`reset`) or answers a status (500)."""

    daemon_threads = True

    def __init__(self, to: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.to, self.url = to, f"http://127.0.0.1:{self.server_port}"
        self.fault: str | int | None = None
        self.at, self.failed, self.over = "", Event(), Event()
        Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    server: Between

    def do_POST(self) -> None:
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if server.at in f"{self.path} {body.decode(errors='ignore')}":
            server.at = ""
        fault = None if server.at else server.fault
        if fault:
            server.failed.set()
        if fault == "hang":
            server.over.wait(60)
        if fault in ("hang", "reset"):
            return self.connection.close()
        if fault:
            return self._answer(int(fault), b"{}")
        to = HTTPConnection("127.0.0.1", server.to)
        to.request(self.command, self.path, body, {"Content-Type": self.headers.get("Content-Type", "")})
        answer = to.getresponse()
        self._answer(answer.status, answer.read())
        to.close()

    do_GET = do_PUT = do_PATCH = do_POST

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(mlflow_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Between]:
    between = Between(mlflow_port)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", between.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow, "BEGIN", 2)
    monkeypatch.setattr(mlflow, "END", 8)
    yield between
    between.over.set()
    between.shutdown()
    between.server_close()


class Training:
    """What a run does: each step is a row of metrics.csv and two calls of its loggers."""

    def __init__(self, folder: Path, *steps: int, lr: float = 1.0, wait: Event | None = None, at: int = -1) -> None:
        folder.mkdir(exist_ok=True)
        file = MetricsFile(folder / "metrics.csv")
        file.resume(min(steps) - 1 if steps else 99)
        answers_file.keep_until(folder, min(steps) - 1 if steps else 99)
        self.slowest = 0.0
        with choose.tracking() as trackers:
            config = {"optimizer": {"lr": lr}}
            made = mlflow.mlflow_logger(
                run="run", name="lr=1", folder=folder, group="g", project=folder.name, tags=["a"], config=config
            )
            self.logger: Any = guarded(made, "mlflow")
            trackers.append(self.logger)
            for step in steps:
                begun = time.monotonic()
                for logger in (file, self.logger):
                    logger.log_metrics({"train/loss": 9.0 - step, "train/lr/*norm*": 1.0}, step)
                answers_file.append(folder, [{**ANSWER, "step": step}])
                self.logger.log_answers(step, [{**ANSWER, "step": step}])
                for logger in (file, self.logger):
                    logger.log_metrics({"val/loss": float(step)}, step)
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if wait and step == at:
                    assert wait.wait(20)
            self.logger.finalize("success")


def check_all(port: int, folder: Path) -> Any:
    """MLflow has each step once, and all answers."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"http://127.0.0.1:{port}")
    (run,) = client.search_runs([client.get_experiment_by_name(folder.name).experiment_id])
    for name, expected in (("train/loss", [9.0, 8.0, 7.0, 6.0]), ("val/loss", [0.0, 1.0, 2.0, 3.0])):
        points = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in points] == list(zip(STEPS, expected, strict=True))
    answers = client.load_table(run.info.experiment_id, "samples.json", [run.info.run_id])
    assert answers["step"].tolist() == STEPS
    assert run.info.status == "FINISHED" and not (folder / MLFLOW_LACKS).exists()
    return client, run


def test_mlflow_has_each_step_once_and_all_else_of_a_run(
    tmp_path: Path, mlflow_port: int, server: Between, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "once"
    folder.mkdir()
    (folder / "preview.html").write_text("shown")
    Training(folder, 0, 1, 2)
    Training(folder, 2, 3, lr=2.0)
    client, run = check_all(mlflow_port, folder)
    assert run.data.metrics["train/lr/_norm_"] == 1.0
    assert (run.data.params["optimizer.lr"], run.data.tags["changed.optimizer.lr"]) == ("1.0", "2.0")
    assert (run.info.run_name, run.data.tags["group"], run.data.tags["a"]) == ("lr=1", "g", "")
    stored = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert stored == {"config.json", "preview.html", "samples.json", "samples.jsonl"}
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("moment", "fault"),
    [
        *(("experiments", fault) for fault in ("hang", "reset", 500)),
        *(('"step": 2', fault) for fault in ("hang", "reset", 500)),
        *(("runs/create", "reset"), ("set-tag", "hang"), ("runs/update", "hang"), ("runs/update", 500)),
    ],
)
def test_server_that_fails_holds_up_nothing_and_gets_the_rest_later(
    moment: str,
    fault: str | int,
    tmp_path: Path,
    mlflow_port: int,
    server: Between,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the start, while the run begins, with its first answers, midway, and at its end."""
    folder = tmp_path / f"{re.sub('[^a-z]', '', moment)}-{fault}"
    server.fault, server.at = fault, moment
    begun = time.monotonic()
    training = Training(folder, *STEPS)
    assert time.monotonic() - begun < 2 + 8 + 4  # BEGIN, END and what this machine takes
    assert training.slowest < 1
    assert server.failed.is_set()
    *_, line = lines = capsys.readouterr().out.splitlines()
    assert "MLflow hasn't got all of this run, and gets the rest by the same command again: " in line
    assert len(lines) <= 2 and (folder / MLFLOW_LACKS).exists()
    assert Metrics.read(folder / "metrics.csv").values("train/loss") == [9.0, 8.0, 7.0, 6.0]

    training.logger.thread.join(20)
    server.fault = None
    Training(folder)  # as the same command does
    check_all(mlflow_port, folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("moment", ["experiments", '"step": 1'])
def test_an_absence_is_made_up_for_in_the_same_run(
    moment: str,
    tmp_path: Path,
    mlflow_port: int,
    server: Between,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(mlflow, "AGAIN", 0.2)
    folder = tmp_path / f"absence-{moment[-1]}"
    server.fault, server.at = 500, moment
    back = Event()

    def come_back() -> None:
        assert server.failed.wait(20)
        time.sleep(0.5)
        server.fault = None
        back.set()

    Thread(target=come_back, daemon=True).start()
    Training(folder, *STEPS, wait=back, at=2)
    check_all(mlflow_port, folder)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("MLflow failed; the run continues without it, and asks it again later: ")


def test_a_full_disk_is_one_line_and_the_folder_gets_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from mlflow.tracking import MlflowClient

    def full(*_: object, metrics: list[Any], **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "full"
    Training(folder, 0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(SqlAlchemyStore, "log_batch", full)
        Training(folder, 2, 3)
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("MLflow hasn't got all of this run") and line.endswith("No space left on device")
    Training(folder)
    client = MlflowClient(f"sqlite:///{folder}/mlflow/mlflow.db")
    points = client.get_metric_history((folder / "mlflow.id").read_text(), "train/loss")
    assert [point.step for point in points] == STEPS


def test_a_finished_run_that_mlflow_lacks_is_sent_by_the_same_command(
    sft: Sft, mlflow_port: int, server: Between, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    server.fault, server.at = "hang", '"step": 1'
    command = ("run=run", "max_steps=2", "val_every=1", "export=false", "logger=mlflow", "logger.project=finished")
    assert sft.train(*command) == 0
    assert "MLflow hasn't got all of this run" in capsys.readouterr().out
    losses = Metrics.read(sft.run_folder() / "metrics.csv").values("val/loss")
    assert len(losses) == 3
    server.fault = None
    assert sft.train(*command) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    points = MlflowClient(f"http://127.0.0.1:{mlflow_port}").get_metric_history(
        (sft.run_folder() / "mlflow.id").read_text(), "val/loss"
    )
    assert [point.value for point in points] == losses
    assert not (sft.run_folder() / MLFLOW_LACKS).exists()
