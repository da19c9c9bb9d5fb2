"""Callbacks are restored with the run, or refused before its first step."""

from pathlib import Path

import lightning.pytorch.callbacks as lightning
import pytest

from running import Sft
from sft.training.callbacks import REFUSED, bases

SETTINGS = ("epochs=2", "val_every=4", "run=run", "export=false")


def test_the_names_of_those_that_are_refused_are_lightnings() -> None:
    assert all(issubclass(getattr(lightning, name), lightning.Callback) for name in REFUSED if name != "SpikeDetection")
    left = {name for name in lightning.__all__ if name not in REFUSED}
    works = {"EarlyStopping", "LearningRateMonitor", "DeviceStatsMonitor", "LambdaCallback", "Timer", "ModelSummary"}
    shows = {"ProgressBar", "TQDMProgressBar", "RichProgressBar", "RichModelSummary", "ThroughputMonitor"}
    assert left == works | shows | {"Callback", "BasePredictionWriter"}  # a new one is tried before it is listed here
    assert ("lightning.pytorch.callbacks.early_stopping", "EarlyStopping") in bases([lightning.EarlyStopping("x")])


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("lightning.pytorch.callbacks.EMAWeightAveraging", "EMAWeightAveraging validates an average, while"),
        (
            "lightning.pytorch.callbacks.LearningRateFinder",
            "LearningRateFinder takes the run's own steps for its trials",
        ),
        ("observers.Averages", "WeightAveraging validates an average, while the weights themselves are saved"),
    ],
)
def test_what_would_train_otherwise_is_refused(
    sft: Sft, target: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train(*SETTINGS, "data.cache_dir=cache", f"+callbacks.own._target_={target}") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"sft: callbacks: {line}") and len(printed.err.splitlines()) == 1
    assert "step 0" not in printed.out
    if target.startswith("lightning"):
        assert not Path("cache").exists()  # before the data are read
    assert not sft.run_folder().exists()


def test_what_a_callback_puts_into_a_checkpoint_is_restored(sft: Sft) -> None:
    counts = f"+callbacks.counts={{_target_: observers.Counts, path: {sft.folder}/count}}"
    time_is_up = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 3}", "max_time=100:00:00")
    assert sft.train(*SETTINGS, counts, *time_is_up) == 75
    assert Path("count").read_text() == "6"  # micro-batches
    assert sft.train(*SETTINGS, counts) == 0
    assert Path("count").read_text() == "12"


@pytest.mark.parametrize(
    ("form", "why"),
    [("object", "TypeError: pathlib.PosixPath is no plain value"), ("weights", "KeyError: 'state_dict'")],
)
def test_a_state_that_no_checkpoint_can_hold_is_refused_before_the_first_step(
    sft: Sft, form: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = f"+callbacks.counts={{_target_: observers.Counts, path: {sft.folder}/count, form: {form}}}"
    assert sft.train(*SETTINGS, counts) == 2
    assert capsys.readouterr().err.startswith(f"sft: the state of Counts can't be saved and read again ({why}")
    assert not Path("count").exists()


def test_a_callback_that_stops_before_the_first_step_is_named_in_one_line(
    sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train(*SETTINGS, "+callbacks.own._target_=mishaps.StopsAtOnce") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: StopsAtOnce stopped it before its first step: leave the callback out")
