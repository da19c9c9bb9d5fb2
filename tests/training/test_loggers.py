"""Which loggers a run has, what each gets, and that none of them can end it."""

import errno
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.types import RunMode
from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig, open_dict

import offline
from offline import ANSWER
from running import Sft
from sft.config import CONF
from sft.errors import UserError
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run
from sft.training.trackers import about, choose, tensorboard, wandb_run
from sft.training.trackers.guard import guarded
from sft.training.trackers.tensorboard import tensorboard_logger

SHORT = ("run=run", "max_steps=2", "val_every=1", "export=false")
CSV = "lightning.pytorch.loggers.CSVLogger"


@pytest.fixture(autouse=True)
def no_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever an earlier test of this process has left of Hydra."""
    monkeypatch.setattr(about, "HydraConfig", SimpleNamespace(initialized=lambda: False))


class Failing(Logger):
    """Fails whatever it is asked for."""

    name = "failing"
    version = 0

    def log_metrics(self, *_: object, **__: object) -> None:
        raise ConnectionError("its server\nis gone")

    log_hyperparams = finalize = save = log_answers = log_metrics


class Told(CSVLogger):
    """Is told of the run what it has parameters for."""

    def __init__(self, folder: Path, group: str, project: str, name: str) -> None:
        super().__init__(folder, name="told")
        self.log_hyperparams({"group": group, "project": project, "called": name})


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["trainer=cpu", "+model.path=x", *overrides])


def test_several_loggers_and_the_users_own_get_the_same_steps(sft: Sft) -> None:
    own = (f"+logger.mine._target_={CSV}", "+logger.mine.save_dir=elsewhere", "+logger.mine.name=mine")
    assert sft.train(*SHORT, "logger=[wandb,tensorboard]", "logger.tags=[a]", *own) == 0
    folder = sft.run_folder()
    assert [row["_step"] for row in offline.history(folder)] == [0, 1, 2]
    assert offline.run(folder)["tags"] == ["a"]
    (file,) = (folder / "tensorboard").glob("events.*")
    assert scalars(file)["val/loss"].keys() == {0, 1, 2}
    logged = Metrics.read(Path("elsewhere/mine/version_0/metrics.csv"))
    assert logged.values("train/loss") == pytest.approx(Metrics.read(folder / "metrics.csv").values("train/loss"))


def test_a_logger_may_be_all_of_the_group_and_a_function_is_told_of_the_run(tmp_path: Path) -> None:
    config = composed("logger=csv")
    with open_dict(config):
        config.logger = {"_target_": CSV, "save_dir": str(tmp_path), "name": "mine"}
    alone, alerts = choose.start(config, Run(tmp_path), [])
    assert isinstance(alone, CSVLogger) and type(alerts).__name__ == "Alerts"

    config = composed("logger=csv", "+logger.project=p")
    with open_dict(config):
        config.logger.mine = {"_target_": f"{__name__}.Told", "_partial_": True}
    told, _ = choose.start(config, Run(tmp_path / "sft-1"), [])
    assert isinstance(told, Told)
    assert told.experiment.hparams == {"group": "sft", "project": "p", "called": "sft-1"}


def test_a_users_file_may_name_several(sft: Sft) -> None:
    (sft.folder / "conf" / "logger").mkdir(parents=True)
    (sft.folder / "conf" / "logger" / "many.yaml").write_text("defaults: [tensorboard, wandb]\nproject: mine\n")
    assert sft.train("--config-dir", "conf", *SHORT[:2], "logger=many", "export=false", "logger.notes=why") == 0
    assert offline.run(sft.run_folder())["project"] == "mine"
    assert list((sft.run_folder() / "tensorboard").glob("events.*"))


def test_a_logger_that_fails_ends_no_run(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train(*SHORT, f"+logger.bad._target_={__name__}.Failing") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "bad" in line]
    assert line == "bad failed; the run continues without it until it is resumed: its server is gone"
    assert len(Metrics.read(sft.run_folder() / "metrics.csv").rows) == 3


@pytest.mark.parametrize("method", ["log_hyperparams", "finalize", "save", "log_answers"])
def test_each_method_of_a_logger_may_fail(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    logger: Any = guarded(Failing(), "mine")
    getattr(logger, method)()
    logger.log_metrics({}, 1)  # it isn't asked again
    assert capsys.readouterr().out.count("mine failed") == 1


def test_a_logger_that_can_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(wandb_run, "write_text", full)
    (alerts,) = choose.start(composed("logger=wandb"), Run(tmp_path), [])
    assert type(alerts).__name__ == "Alerts"
    assert capsys.readouterr().out == (
        "wandb can't be used; the run continues without it until it is resumed: [Errno 28] No space left on device\n"
    )
    config = composed("logger=csv")
    with open_dict(config):
        config.logger.mine = {"_target_": CSV, "_partial_": True}  # save_dir is missing
    with pytest.raises(UserError, match=r"logger\.mine refuses its settings: .*save_dir"):
        choose.start(config, Run(tmp_path), [])


def scalars(file: Path) -> dict[str, dict[int, float]]:
    """Values of a TensorBoard file by name and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: {each.step: each.value for each in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_settings_beside_the_best_and_last_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    history = [{"step": "0", "val/loss": "3.0"}, {"step": "1", "val/loss": "1.0"}]
    config = {"optimizer": {"lr": 0.5, "name": None}}
    logger = tensorboard_logger(run="r", folder=tmp_path, history=history, config=config)
    logger.log_metrics({"val/loss": 2.0, "train/tokens_per_second": 9.0}, 2)
    logger.log_answers(2, [ANSWER])
    logger.finalize("success")
    (file,) = (tmp_path / "tensorboard").glob("events.*")
    found = scalars(file)
    assert (found["best/val/loss"], found["last/val/loss"]) == ({2: 1.0}, {2: 2.0})
    assert "last/train/tokens_per_second" not in found
    events = EventAccumulator(str(file), size_guidance={"tensors": 0})
    events.Reload()
    text = events.Tensors("samples/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    ab ab" in text and "score 0.25" in text
    start = HParamsPluginData.FromString(
        events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info
    assert start.hparams["optimizer.lr"].number_value == 0.5
    assert start.hparams["optimizer.name"].string_value == "null"


def test_tensorboard_on_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger: Any = guarded(tensorboard_logger(run="r", folder=tmp_path, history=[]), "tensorboard")
    monkeypatch.setattr(LocalFileSystem, "_write", full)
    monkeypatch.setattr(threading, "excepthook", tensorboard._told)  # pytest has set its own
    for step in range(100):
        logger.log_metrics({"val/loss": 2.0}, step)
        logger.save()
    logger.finalize("success")
    line = "tensorboard failed; the run continues without it until it is resumed: [Errno 28] No space left on device\n"
    assert capfd.readouterr() == (line, "")


@pytest.mark.parametrize(
    ("typed", "overrides", "sweep", "expected"),
    [
        ("train seed=1", ["seed=1"], None, "run"),
        ("train -m seed=1,2 epochs=2", ["seed=2", "epochs=2"], None, "seed=2"),
        (
            "train -m optimizer.lr=1e-5,2e-5 schedule=constant,cosine epochs=2",
            ["optimizer.lr=1e-5", "schedule=constant", "epochs=2"],
            None,
            "lr=1e-5 schedule=constant",
        ),
        (
            "train -m hydra/sweeper=optuna optimizer.lr=tag(log,interval(1e-5,1e-3)) seed=3",
            ["seed=3", "optimizer.lr=0.000123456789"],
            None,
            "lr=0.0001235",
        ),
        (
            "train optimizer.lr=2e-5 seed=1 trainer.devices=1",
            ["optimizer.lr=2e-5", "seed=1", "trainer.devices=1"],
            "optimizer.lr=1e-5,2e-5 seed=1",
            "lr=2e-5",
        ),
        ("train -m a.x=1,2 b.x=1,2", ["a.x=1", "b.x=2"], None, "a.x=1 b.x=2"),
    ],
    ids=["one run", "grid", "two", "optuna", "job array", "alike"],
)
def test_a_run_of_a_sweep_is_named_by_what_differs(
    typed: str, overrides: list[str], sweep: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode = RunMode.MULTIRUN if "-m" in typed.split() else RunMode.RUN
    hydra = SimpleNamespace(mode=mode, overrides=SimpleNamespace(task=overrides))
    monkeypatch.setattr(about, "HydraConfig", SimpleNamespace(initialized=lambda: True, get=lambda: hydra))
    monkeypatch.setattr(sys, "argv", ["sft", *typed.split()])
    if sweep:
        monkeypatch.setenv("SFT_SWEEP", sweep)
    assert about.label("run", named=False) == expected
    assert about.label("run", named=True) == "run"
