"""What W&B gets of a run, whoever holds its key and however its server fails. wandb is the real one."""

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import offline
from offline import ANSWER
from running import Sft
from sft.config import CONF
from sft.errors import UserError
from sft.runs import answers_file, manifest, saved
from sft.runs.metric import timings
from sft.runs.metrics_file import Metrics
from sft.runs.run import WANDB_LACKS
from sft.training.trackers import choose, wandb_files, wandb_run, wandb_server
from sft.training.trackers.guard import guarded
from wandb_server import KEY, Service

HISTORY = [{"step": str(k), "train/loss": str(9 - k), "val/loss": "0.5" if k == 2 else ""} for k in range(4)]
STEPS = [0, 1, 2, 3, 4, 5]
SHORT = ("run=run", "logger=wandb", "max_steps=3", "val_every=1", "export=false")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """wandb without the settings, keys and process of whoever runs the tests."""
    import wandb

    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # of the process that an earlier test had: not to be restored afterwards
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    yield
    wandb.teardown()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A server that works, and its key in the environment."""
    service = Service()
    monkeypatch.setenv("WANDB_BASE_URL", service.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    yield service
    service.vanish()


@pytest.fixture
def console() -> None:
    """wandb listens to what is printed now: it takes the stream that was there when a process first needed it."""
    from wandb.sdk.lib import console_capture

    importlib.reload(console_capture)


def identity(folder: Path) -> str:
    return (folder / "wandb" / "id").read_text()


def track(folder: Path, history: list[dict[str, str]], *steps: int, **options: Any) -> None:
    """What a run does that has `history` already and makes `steps`."""
    options = {"run": "r", "group": "g", "project": "sft", "mode": "auto"} | options
    with choose.tracking():
        logger = wandb_run.wandb_logger(folder=folder, history=history, **options)
        for step in steps:
            logger.log_metrics({"train/loss": float(9 - step)}, step=step)


def kept(folder: Path, kind: str = "offline-run") -> int:
    return len(list((folder / "wandb").glob(f"{kind}-*")))


NETRC = "machine {} login user password " + KEY
WAYS: dict[str, tuple[dict[str, str], dict[str, str], str]] = {
    "nothing": ({}, {}, "offline"),
    "variable": ({"WANDB_API_KEY": KEY}, {}, "online"),
    "wandb login": ({}, {".netrc": "DEFAULT"}, "online"),
    "wandb login of wandb < 0.31": ({}, {".netrc": NETRC.format("api.wandb.ai")}, "online"),
    "wandb login at another server": ({}, {".netrc": NETRC.format("w.example.com")}, "offline"),
    "wandb login at this server": (
        {"WANDB_BASE_URL": "https://w.example.com"},
        {".netrc": NETRC.format("w.example.com")},
        "online",
    ),
    "wandb login --host": (
        {},
        {
            ".netrc": NETRC.format("w.example.com"),
            ".config/wandb/settings": "[default]\nbase_url = https://w.example.com",
        },
        "online",
    ),
    "settings": ({}, {".config/wandb/settings": f"[default]\napi_key = {KEY}"}, "online"),
    "token": ({"WANDB_IDENTITY_TOKEN_FILE": "token.jwt"}, {"../token.jwt": "a.b.c"}, "online"),
    "wandb offline": ({"WANDB_API_KEY": KEY}, {".config/wandb/settings": "[default]\nmode = offline"}, "offline"),
    "WANDB_MODE=online": ({"WANDB_API_KEY": KEY, "WANDB_MODE": "online"}, {}, "online"),
    "WANDB_MODE=offline": ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, {}, "offline"),
    "WANDB_MODE=disabled": ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, {}, "disabled"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_key_is_found_wherever_wandb_finds_one(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    class Asked(BaseException):
        pass

    def init(mode: str, **_: Any) -> None:
        raise Asked(mode)

    environment, files, expected = WAYS[way]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name, text in files.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        default = wandb.Settings().base_url.removeprefix("https://")
        path.write_text(NETRC.format(default) if text == "DEFAULT" else text)
        path.chmod(0o600)
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb_server, "fault", lambda *_: None)
    with pytest.raises(Asked, match=expected):
        track(tmp_path, [])


def test_settings_that_wandb_refuses_are_the_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "w.example.com")
    with pytest.raises(UserError, match=r"wandb's settings are wrong.*base_url"):
        track(tmp_path, [])


def test_tags_that_wandb_refuses_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"settings of logger.*64 characters"):
        track(tmp_path, [], tags=["n" * 65])


def test_disabled_wandb_gets_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track(tmp_path, [], 0, 1, 2, 3)
    import wandb

    wandb.teardown()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(tmp_path, HISTORY, 4, 5)
    assert len(offline.history(tmp_path)) == 4


@pytest.mark.parametrize("had", [0, 2, 5])
def test_only_what_is_missing_is_sent(had: int, tmp_path: Path, service: Service) -> None:
    if had:
        track(tmp_path, [], *range(had), config={"optimizer": {"lr": 1.0}, "gone": True})
    track(tmp_path, HISTORY, 4, 5, config={"optimizer": {"lr": 2.0, "name": None}}, tags="a", job_type="train")
    rows = service.rows(identity(tmp_path))
    assert [row["_step"] for row in rows] == [row["trainer/global_step"] for row in rows] == STEPS
    assert [row["train/loss"] for row in rows] == [9, 8, 7, 6, 5, 4]
    assert had > 2 or rows[2]["val/loss"] == 0.5
    assert identity(tmp_path) in service.complete
    run = service.buckets[identity(tmp_path)]
    assert (run["project"], run["groupName"], run["jobType"], run["tags"]) == ("sft", "g", "train", ["a"])
    assert json.loads(run["config"])["optimizer"] == {"value": {"lr": 2.0, "name": None}}


FAULTS = {
    "vanish": "can't be reached",
    "hang": "doesn't answer|timed out",
    "reset": "can't be reached",
    500: "HTTP 500",
    401: "refuses the key: run `wandb login",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_run_begins_offline_and_is_online_when_started_again(
    fault: str | int,
    tmp_path: Path,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    monkeypatch.setattr(wandb_run, "BEGIN", 2)
    if fault == "vanish":
        service.vanish()
    service.fault = fault
    begun = time.monotonic()
    track(tmp_path, [], 0, 1, 2, 3, mode="online")
    assert time.monotonic() - begun < 10
    (line,) = capsys.readouterr().out.splitlines()
    assert "this run is logged offline" in line
    assert any(reason in line for reason in FAULTS[fault].split("|"))
    wandb.teardown()  # the file is whole when wandb's process has ended
    assert [row["_step"] for row in offline.history(tmp_path)] == [0, 1, 2, 3]

    service.fault = None
    again = Service(service.server_port) if fault == "vanish" else service
    track(tmp_path, HISTORY, 4, 5)
    assert [row["_step"] for row in again.rows(identity(tmp_path))] == STEPS
    assert kept(tmp_path) == 0
    assert f"W&B run {service.url}" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_best_value_its_console_and_takes_changed_settings(
    tmp_path: Path, service: Service, console: None
) -> None:
    import wandb

    losses, history = [3.0, 1.0, 2.0, 2.5], []
    for attempt, steps in enumerate(((0, 1, 2), (2, 3)), 1):
        with choose.tracking() as trackers:
            logger = wandb_run.wandb_logger(
                run="r",
                folder=tmp_path,
                group="g",
                history=history,
                project="sft",
                mode="online",
                config={"trainer": {"devices": attempt}},
            )
            trackers.append(logger)
            for step in steps:
                logger.log_metrics({"val/loss": losses[step]}, step=step)
            print("attempt", attempt)
            logger.finalize("success")
        wandb.teardown()
        history = [{"step": "0", "val/loss": "3.0"}, {"step": "1", "val/loss": "1.0"}]
    run = identity(tmp_path)
    assert service.summary(run)["val/loss"] == {"min": 1.0, "last": 2.5}
    assert json.loads(service.buckets[run]["config"])["trainer"] == {"value": {"devices": 2}}
    assert len({name for name in service.files[run] if name.startswith("logs/")}) == 2  # a part for each attempt
    assert [row["val/loss"] for row in service.rows(run)] == losses


def made(folder: Path) -> tuple[list[dict[str, str]], bytes]:
    """The figures of a run that don't depend on the machine, and its last weights."""
    metrics = Metrics.read(folder / "metrics.csv")
    ignored = timings(metrics.columns)
    rows = [{name: value for name, value in row.items() if name not in ignored} for row in metrics.rows]
    *_, last = sorted((folder / "checkpoints").glob("*/*.safetensors"))
    return rows, last.read_bytes()


@pytest.mark.parametrize(
    ("moment", "fault"),
    [("createRunFiles", "hang"), (r"_step\":1,", "vanish"), (r"_step\":3,", "hang"), (r"_step\":3,", "vanish")],
    ids=["begun", "midway", "end, no answer", "end"],
)
def test_server_that_fails_at_any_moment_holds_up_nothing(
    moment: str,
    fault: str,
    sft: Sft,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(wandb_run, "END", 1)
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "0.01")
    service.fault, service.at = fault, moment
    about = ("logger.entity=team", "logger.tags=[a,b]", "logger.notes=why", "logger.job_type=train")
    group = ["logger.group=several"] if fault == "hang" else []
    assert sft.train(*SHORT, *about, *group) == 0
    rows = Metrics.read(sft.run_folder() / "metrics.csv").rows
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert len(service.rows(identity(sft.run_folder()))) < len(rows)
    out = capsys.readouterr().out
    (command,) = [line for line in out.splitlines() if "wandb sync" in line]
    run = service.buckets[identity(sft.run_folder())]
    assert (run["entity"], run["tags"], run["notes"], run["jobType"]) == ("team", ["a", "b"], "why", "train")
    assert run["groupName"] == ("several" if group else "sft")
    if (moment, fault) == (r"_step\":1,", "vanish"):
        assert sft.train("run=plain", *SHORT[2:]) == 0
        assert made(sft.run_folder()) == made(sft.run_folder("plain"))
    assert json.loads(run["config"])["optimizer"]["value"]["lr"] == 0.01

    service.vanish()
    later = Service()
    _, _, words = command.partition("wandb sync ")
    wandb = [sys.executable, "-m", "wandb", "sync", *words.split()]
    synced = subprocess.run(wandb, env=os.environ | {"WANDB_BASE_URL": later.url}, capture_output=True, text=True)
    assert "Finished syncing" in synced.stderr
    assert [row["_step"] for row in later.rows(identity(sft.run_folder()))] == [0, 1, 2, 3]
    later.vanish()


def test_an_end_that_wandb_never_reaches_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setattr(wandb, "finish", lambda: time.sleep(60))
    monkeypatch.setattr(choose, "LONGEST", 0.5)
    begun = time.monotonic()
    track(tmp_path, [], 0, 1)
    assert time.monotonic() - begun < 10
    assert "W&B hasn't got all of this run (no answer in 0.5 seconds)" in capsys.readouterr().out


def test_a_disk_of_wandb_that_was_full_is_said_and_made_up_for(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """wandb's own process says so in its log alone."""
    import wandb

    finish = wandb.finish

    def full() -> None:
        log = Path(wandb.run.dir).parent / "logs" / "debug-internal.log"  # type: ignore[union-attr]
        finish()
        with log.open("a") as file:
            file.write('{"msg":"writer: failed to save record: write run-r.wandb: no space left on device"}')

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "finish", full)
        assert sft.train(*SHORT) == 0
    folder, said = sft.run_folder(), "W&B lacks steps, since its disk was full"
    assert said in capsys.readouterr().out and (folder / WANDB_LACKS).exists()
    (first,) = (folder / "wandb").glob("offline-run-*")
    time.sleep(1)  # wandb's folders are named by the second
    assert sft.train(*SHORT) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and said not in out and not (folder / WANDB_LACKS).exists()
    (second,) = (folder / "wandb").glob("offline-run-*")
    assert second != first and [row["_step"] for row in offline.history(folder)] == [0, 1, 2, 3]


def weights(folder: Path) -> None:
    """Two checkpoints, of which the first is the best, and the export of the second."""
    for step, loss in ((1, 2.0), (2, 3.0)):
        checkpoint = folder / "checkpoints" / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        state = dict.fromkeys(saved.NEEDED) | {"format": 3, "step": step, "val_loss": loss}
        manifest.write_sealed(checkpoint / "state.json", state)
        (checkpoint / "shard.safetensors").write_text(f"weights {step}")
    (folder / "export").mkdir()
    (folder / "export" / "verified.json").write_text('{"step": 2}')


@pytest.mark.parametrize("log_model", ["none", "reference", "upload"])
def test_wandb_gets_the_weights_by_choice(log_model: str, tmp_path: Path, service: Service) -> None:
    weights(tmp_path)
    with choose.tracking() as trackers:
        trackers.append(
            wandb_run.wandb_logger(
                run="a run",
                folder=tmp_path,
                group="g",
                history=[],
                project="sft",
                mode="online",
                log_model=log_model,
            )
        )
    found = sorted((each["type"], each["aliases"], sorted(each.get("files", []))) for each in service.artefacts)
    files = ["shard.safetensors", "state.json"] if log_model == "upload" else []
    assert found == (
        [
            ("checkpoint", ["best", "latest", "step-1"], files),
            ("checkpoint", ["last", "latest", "step-2"], files),
            ("model", ["last", "latest", "step-2"], ["verified.json"] if files else []),
        ]
        if log_model != "none"
        else []
    )
    assert all(each["committed"] for each in service.artefacts)
    assert all(re.fullmatch(r"a_run-[0-9a-f]{8}-(checkpoint|model)", each["name"]) for each in service.artefacts)


def test_an_upload_ends_when_the_server_is_gone(
    tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module, name in ((wandb_run, "END"), (wandb_server, "ANSWER"), (wandb_files, "POLL")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(choose, "LONGEST", 4)  # wandb doesn't always keep its own limit
    weights(tmp_path)
    service.fault, service.at = "hang", "CreateArtifactFiles"
    begun = time.monotonic()
    with choose.tracking() as trackers:
        run = wandb_run.wandb_logger(
            run="r", folder=tmp_path, group="g", history=[], project="sft", mode="online", log_model="upload"
        )
        trackers.append(guarded(run, "wandb"))  # type: ignore[arg-type]
    assert time.monotonic() - begun < 30
    assert "wandb failed; the run continues without it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("moment", "fault", "lost"),
    [
        ("samples:latest", "hang", "W&B gets no more answers until the run is resumed"),
        ("files:latest", "hang", "wandb failed; the run continues without it"),
        ("CreateArtifact (", 500, ""),  # wandb's own process retries, and the end waits no longer
        ("CreateArtifactFiles", "reset", ""),
    ],
)
def test_answers_and_artefacts_wait_for_no_server(
    moment: str,
    fault: str | int,
    lost: str,
    tmp_path: Path,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module, name in ((wandb_run, "END"), (wandb_server, "ANSWER"), (wandb_files, "SEND")):
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(wandb_run, "BEGIN", 3)
    monkeypatch.setattr(choose, "LONGEST", 4)  # wandb doesn't always keep its own limit
    service.fault, service.at = fault, moment
    (tmp_path / "preview.html").write_text("shown")
    begun = time.monotonic()
    with choose.tracking() as trackers:
        run = wandb_run.wandb_logger(run="r", folder=tmp_path, group="g", history=[], project="sft", mode="auto")
        logger: Any = guarded(run, "wandb")
        trackers.append(logger)
        for step in range(3):
            logger.log_metrics({"train/loss": 1.0}, step)
            logger.log_answers(step, [{**ANSWER, "step": step}])
    assert time.monotonic() - begun < 30
    _, *lines = capsys.readouterr().out.splitlines()  # the first has the address
    assert any(line.startswith(lost) for line in lines) and "W&B hasn't got all of this run" in lines[-1]
    assert len(lines) <= 3


def test_what_wandb_has_of_a_training(sft: Sft, console: None) -> None:
    settings = ("logger.tags=[a]", "logger.notes=why", "logger.log_model=reference", "optimizer.lr=2e-2")
    assert sft.train("run=run", "logger=wandb", "max_steps=2", "val_every=1", *settings) == 0
    folder = sft.run_folder()
    config = offline.config(folder)
    assert config["optimizer"]["lr"] == 0.02
    assert config["data_fingerprint"] == json.loads((folder / "provenance.json").read_text())["data"]
    assert config["ledger"] == json.loads((folder / "data.json").read_text())
    assert config["hosts"] == [socket.gethostname()]
    begun = offline.run(folder)
    assert (begun["project"], begun["group"], begun["job_type"], begun["tags"]) == ("sft", "sft", "train", ["a"])
    assert begun["notes"] == "why" and begun["name"] == "run"
    losses = Metrics.read(folder / "metrics.csv").values("val/loss")
    assert offline.summary(folder)["val/loss"] == {"min": min(losses), "last": losses[-1]}
    shown, *weights = offline.artefacts(folder)
    assert shown["files"].keys() >= {"preview.html", "data.json"} and shown["type"] == "run"
    kinds = [(each["type"], each["aliases"]) for each in weights]
    assert kinds[:2] == [("checkpoint", ["latest", "step-1"]), ("checkpoint", ["best", "last", "latest", "step-2"])]
    assert kinds[2] == ("model", ["best", "last", "latest", "step-2"])
    place = (folder / "export" / "model.safetensors").absolute().as_uri()
    assert weights[2]["files"]["model.safetensors"] == place
    assert "step 2: validation loss" in offline.console(folder)


def test_answers_are_a_table_of_all_steps(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"num_ranks": 2, "hosts": ["n1", "n2"]}')
    answers_file.append(tmp_path, [ANSWER, {**ANSWER, "step": 1, "answer": "ba"}])
    with choose.tracking():
        logger: Any = wandb_run.wandb_logger(
            run="r", folder=tmp_path, group="g", history=[], project="sft", mode="offline", name="lr=1"
        )
        logger.log_metrics({"val/loss": 1.0}, step=0)
        logger.log_answers(0, [ANSWER])
        logger.log_answers(1, [{**ANSWER, "step": 1, "answer": "ba"}])
        (tmp_path / "recipe.json").write_text('{"num_ranks": 4, "hosts": ["n1"]}')
        logger.log_metrics({"val/loss": 1.0}, step=1)
        logger.alert("Loss spikes", "it is 9")
    table = offline.table(tmp_path, "samples")
    assert table["columns"] == ["step", "prompt", "reference", "base", "answer", "score", "length", "stopped"]
    assert table["data"][0] == [0, "Reverse ab.", "ba", None, "ab ab", 0.25, 6, True]
    assert [row[4] for row in table["data"]] == ["ab ab", "ba"]
    assert offline.config(tmp_path)["recipe"] == {"num_ranks": 4, "hosts": ["n1"]}
    assert offline.run(tmp_path)["name"] == "lr=1"
    assert offline.alerts(tmp_path) == [("Loss spikes", "it is 9")]
    assert not list((tmp_path / "home").rglob("artifacts"))


def test_a_run_begun_anew_under_the_same_name_is_another_one(tmp_path: Path, service: Service) -> None:
    folders = [tmp_path / "mine" / "r", tmp_path / "theirs" / "r"]
    track(folders[0], [], 0, 1, 2)
    first = identity(folders[0])
    shutil.rmtree(folders[0])
    for folder in folders:
        track(folder, [], 0, 1)
    ids = {first, *map(identity, folders)}
    assert len(ids) == 3 and all(re.fullmatch("r-[0-9a-f]{8}", each) for each in ids)
    assert [len(service.rows(each)) for each in (first, *map(identity, folders))] == [3, 2, 2]
    assert {service.buckets[each]["displayName"] for each in ids} == {"r"}


def test_a_run_begun_when_the_id_was_its_name_keeps_it(tmp_path: Path, service: Service) -> None:
    (tmp_path / "wandb").mkdir()
    track(tmp_path, [], 0, 1)
    assert len(service.rows("r")) == 2


def test_a_long_name_is_cut(tmp_path: Path, service: Service) -> None:
    track(tmp_path, [], 0, run="n" * 200)
    assert list(map(len, service.complete)) == [128]


def test_a_process_of_wandb_that_is_shared_writes_to_the_runs_folder(
    sft: Sft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent of a sweep has one already, in a folder of its own."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "elsewhere").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "elsewhere")
        wandb.setup()
    assert "WANDB_SERVICE" in os.environ
    ended = sft.process("train", *sft.settings, *SHORT)
    assert ended.code == 0, ended.output
    assert kept(sft.run_folder()) == 1


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # wandb's, of the sweep's settings
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_agent_of_a_sweep_trains_runs_that_belong_to_it(
    sft: Sft, tmp_path: Path, service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """W&B's own agent makes the command of the sweep's file and of what the sweep has chosen."""
    import wandb
    from wandb import wandb_agent

    sweep = yaml.safe_load((CONF / "wandb_sweep.yaml").read_text())
    assert sweep["metric"] == {"name": "val/loss", "goal": "minimize"}
    made: list[tuple[list[str], dict[str, str]]] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> Any:
        made.append((command, env))
        return SimpleNamespace()

    monkeypatch.setattr(wandb_agent, "AgentProcess", start)
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_PROJECT", "sft")  # as the agent sets them
    monkeypatch.setenv("WANDB_ENTITY", "me")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    agent = wandb_agent.Agent(None, None)
    agent._sweep_command = sweep["command"]
    for number in range(2):
        chosen = {"optimizer.lr": {"value": 0.000123456}, "seed": {"value": 1}}
        wandb.teardown()  # each is a process of its own
        agent._command_run({"run_id": f"trial{number}", "program": sweep["program"], "args": chosen})
        (program, command, *settings), environment = made[-1]
        assert (program, command) == ("sft", "train")
        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
            monkeypatch.setenv(name, environment[name])
        own = [setting for setting in settings if not setting.startswith("experiment=")]
        assert sft.train("max_steps=2", "val_every=1", *own) == 0
        assert [file.read_text() for file in sft.folder.glob("runs/*/wandb/id")] == [f"trial{number}"]
        run = service.buckets[f"trial{number}"]
        assert (run["sweep"], run["displayName"]) == ("s1", "lr=0.0001235 seed=1")
        assert [row["_step"] for row in service.rows(f"trial{number}")] == [0, 1, 2]
        assert all("val/loss" in row for row in service.rows(f"trial{number}"))
    assert "is finished: nothing to do" in capsys.readouterr().out  # the second has the same settings
