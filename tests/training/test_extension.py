"""A finished run extended by a new one goes on as if it had been longer."""

from pathlib import Path

import pytest

from runfiles import final_files, last_checkpoint, rows
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.runs.run import Run

SETTINGS = ("val_every=2", "export=false", "averaging=ema", "averaging.decay=0.5", "evaluation.layers_every=1")
CONSTANT = ("schedule=constant", "schedule.warmup=0")
EXTEND = ("extend.run=run", "run=longer")
TIME_IS_UP = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 8}", "max_time=100:00:00")


@pytest.fixture
def run(sft: Sft) -> Path:
    """A run of two epochs, of three steps each."""
    assert sft.train("run=run", "epochs=2", *SETTINGS, *CONSTANT) == 0
    return sft.run_folder()


def without_base(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    of_base = ("val/gain", "val/gain_error", "val/kl_base", "val/base_tokens_loss")
    return [{name: value for name, value in row.items() if name not in of_base} for row in rows]


def test_an_extended_run_is_one_that_was_longer_to_the_bit(
    sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train("run=whole", "epochs=3", *SETTINGS, *CONSTANT) == 0
    capsys.readouterr()
    longer = ("epochs=3", *SETTINGS, *CONSTANT, *EXTEND)
    assert sft.train(*longer, *TIME_IS_UP) == 75
    assert sft.train(*longer) == 0
    printed = capsys.readouterr().out
    assert f"run runs/longer: 9 steps, extends {run.relative_to(sft.folder)} after step 6\n" in printed
    assert "run runs/longer: 9 steps, resumed after step 8\n" in printed
    folder = sft.run_folder("longer")
    assert final_files(folder) == final_files(sft.run_folder("whole"))
    assert [row["step"] for row in rows(folder)] == ["6", "7", "8", "9"]
    # It is compared with what it began with.
    assert without_base(rows(folder)[1:]) == without_base(rows(sft.run_folder("whole"))[7:])
    assert rows(folder)[0]["val/loss"] == rows(run)[-1]["val/loss"] and not rows(folder)[0]["train/loss"]
    assert Run(folder).config["extend"] == {"run": "run", "schedule": "continue", "step": 6}
    assert Run(run).status["step"] == 6


@pytest.mark.parametrize(
    ("schedule", "rates"), [("continue", [0.0025, 0.00125]), ("restart", [0.01, 0.005])], ids=lambda value: str(value)
)
def test_the_schedule_of_an_extension(sft: Sft, run: Path, schedule: str, rates: list[float]) -> None:
    # Linear to 0: over 8 steps at the 7th and 8th, or over the 2 new ones.
    line = ("schedule=linear", "schedule.warmup=0", "schedule.final=0", f"extend.schedule={schedule}")
    assert sft.train("max_steps=8", "epochs=3", *SETTINGS, *line, *EXTEND) == 0
    made = [float(row["train/lr"]) for row in rows(sft.run_folder("longer")) if row["train/loss"]]
    assert made == pytest.approx(rates)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            ("epochs=3", "data.max_length=128"),
            "runs/run has data.max_length=256, not 128: a run is extended with the same",
        ),
        (("epochs=3", "optimizer=sgd"), "runs/run has optimizer._target_=torch.optim.AdamW, not torch.optim.SGD"),
        (("epochs=2",), "runs/run: epochs and max_steps mean 6 steps, and it has made 6"),
        (("epochs=3", "extend.step=5"), "checkpoint=5 is not there: set last, best or a step, one of 4, 6"),
        (("epochs=3", "extend.run=other"), "there is no run other"),
        (
            ("epochs=3", "extend.schedule=restart", "schedule.warmup=3"),
            "schedule.warmup=3 takes the run's 3 steps or more",
        ),
    ],
)
def test_what_can_not_be_extended(
    sft: Sft, run: Path, settings: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train(*SETTINGS, *CONSTANT, *EXTEND, *settings) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error
    assert not sft.run_folder("longer").exists()


def test_more_epochs_begin_anew_and_say_what_an_extension_would_do(
    sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train("run=anew", "epochs=3", *SETTINGS, *CONSTANT, "max_steps=1") == 0
    note = "note: runs/run is finished and differs in its length alone: extend.run=run would continue from its step 6"
    assert note in capsys.readouterr().err
    assert last_checkpoint(sft.run_folder("anew")).step == 1
    assert [each.step for each in complete(run / "checkpoints")] == [4, 6]


def test_a_run_whose_optimizer_states_were_dropped_is_exported_and_scored_and_not_extended(
    sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("epochs=2", "val_every=2", *CONSTANT)
    assert sft.train("run=run", *settings, "checkpoint.drop_optimizer=true") == 0
    kept = complete(sft.run_folder() / "checkpoints")
    assert [list(each.state["files"]) for each in kept] == [["weights-shard-00000-of-00001.safetensors"]] * 2
    assert sft("export", "run=run", "checkpoint=4", "output=earlier") == 0
    assert sft("score", "run=run", "output=scores.jsonl") == 0
    capsys.readouterr()
    assert sft.train(*settings, "epochs=3", *EXTEND) == 2
    assert "sft: extend.run=runs/run: its optimizer states were dropped" in capsys.readouterr().err


def test_a_rehearsal_trains_no_extension(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("rehearse", *sft.settings, *SETTINGS, *CONSTANT, "epochs=3", *EXTEND, "rehearse.timeout=60") == 0
    assert "rehearsed in " in capsys.readouterr().out
