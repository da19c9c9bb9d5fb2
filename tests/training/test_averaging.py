"""Averages of the weights: what they are, that training doesn't notice them, and that they are saved and exported."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runfiles import rows
from running import Sft
from sft.checkpoint.checkpoint import Checkpoint, complete
from sft.runs.run import Run

SETTINGS = ("epochs=2", "val_every=2", "checkpoint.save_every=1", "checkpoint.keep_last=9", "export=false")
EMA = ("averaging=ema", "averaging.decay=0.75")
SWA = ("averaging=swa", "averaging.start=2", "averaging.every=2")


def steps(folder: Path) -> list[Checkpoint]:
    return complete(folder / "checkpoints")


def same(a: Checkpoint, b: Checkpoint, average: bool) -> bool:
    return all(torch.equal(a.tensor(name, average), b.tensor(name, average)) for name in a.shapes)


def test_averages_are_what_their_formulas_say_and_training_does_not_notice_them(sft: Sft) -> None:
    for run, settings in {"none": (), "ema": EMA, "swa": SWA}.items():
        assert sft.train(f"run={run}", *SETTINGS, *settings) == 0
    plain, ema, swa = (steps(sft.run_folder(run)) for run in ("none", "ema", "swa"))
    assert all(same(one, other, False) for one, other in zip(plain, ema, strict=True))
    assert [each.has_average for each in swa] == [False, True, True, True, True, True]
    start = load_file(Path(sft.settings[0].removeprefix("model.path=")) / "model.safetensors")
    for name in ema[0].shapes:
        weights = [each.tensor(name).double() for each in plain]
        expected = start[name].double()
        for number, each in enumerate(ema):
            expected = 0.75 * expected + 0.25 * weights[number]
            torch.testing.assert_close(each.tensor(name, True).double(), expected, rtol=0, atol=5e-7, msg=name)
        mean = (weights[1] + weights[3] + weights[5]) / 3  # after the steps 2, 4 and 6
        torch.testing.assert_close(swa[-1].tensor(name, True).double(), mean, rtol=0, atol=5e-7, msg=name)
    measured = [(row["step"], bool(row["val/loss_average"])) for row in rows(sft.run_folder("ema")) if row["val/loss"]]
    assert measured == [("0", False), ("2", True), ("4", True), ("6", True)]


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_average_is_exported_on_request_and_is_what_was_validated(
    sft: Sft, adapter: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("run=run", "epochs=2", "val_every=2", "averaging.export=true", f"adapter={adapter}")
    assert sft.train(*settings, *EMA) == 0
    loss = rows(sft.run_folder())[-1]["val/loss_average"]
    line = f"  exported          step 6, the best and the last: validation loss of the average {float(loss):.4f}\n"
    printed = capsys.readouterr().out.replace("average: ", "average ")
    assert line in printed
    assert "an average of the steps'" in (sft.run_folder() / "export" / "README.md").read_text()
    assert sft("export", "run=run", "weights=trained", "output=trained") == 0
    averaged = load_file(sft.run_folder() / "export" / "model.safetensors")
    trained = load_file("trained/model.safetensors")
    assert any(not torch.equal(averaged[name], trained[name]) for name in trained)
    assert sft("score", "run=run", "output=scores.jsonl") == 0
    scores = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    total = sum(score["log_p_response"] for score in scores) / sum(score["num_response_tokens"] for score in scores)
    assert -total == pytest.approx(float(loss), abs=1e-5)


def test_an_average_is_restored_to_the_bit(sft: Sft) -> None:
    settings = ("epochs=2", "val_every=2", "averaging.export=true", "export=false", *EMA)
    assert sft.train("run=whole", *settings) == 0
    time_is_up = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 3}", "max_time=100:00:00")
    assert sft.train("run=run", *settings, *time_is_up) == 75
    assert sft.train("run=run", *settings) == 0
    whole, again = (steps(sft.run_folder(run))[-1] for run in ("whole", "run"))
    assert same(whole, again, True) and same(whole, again, False)
    assert (whole.path / "probes-average.json").read_bytes() == (again.path / "probes-average.json").read_bytes()
    assert rows(sft.run_folder()) == rows(sft.run_folder("whole"))


def test_early_stopping_may_monitor_the_average(sft: Sft) -> None:
    settings = (
        "callbacks=early_stopping",
        "callbacks.early_stopping.monitor=val/loss_average",
        "averaging.export=true",
    )
    patience = ("callbacks.early_stopping.patience=1", "optimizer.lr=1e-12", "val_every=1")
    assert sft.train("run=run", "epochs=2", "export=false", *settings, *patience, *EMA) == 0
    assert Run(sft.run_folder()).status["stopped_early"].startswith("early stopping: val/loss_average did not improve")


def test_a_decay_that_is_too_slow_for_the_run_is_said(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=3", "export=false", "averaging=ema") == 0
    line = "averaging: after 3 steps 100% of the average is still the weights before training: set averaging.decay=0 or"
    assert line in capsys.readouterr().out


def test_another_average_is_another_run_and_its_export_is_not() -> None:
    def name(averaging: dict[str, object]) -> str:
        config = {"run": None, "name": "sft", "runs_dir": "runs", "seed": 0, "averaging": averaging}
        return Run.named(config).folder.name

    ema = {"_target_": "sft.training.averaging.ema", "decay": 0.9, "start": 0, "export": False}
    assert name({}) != name(ema) != name(ema | {"decay": 0.99})
    assert name(ema) == name(ema | {"export": True})


def test_a_checkpoint_without_an_average_has_none_to_export(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    assert sft("export", "run=run", "weights=average") == 2
    assert "step-00000001 holds no average of the weights: set weights=trained" in capsys.readouterr().err
