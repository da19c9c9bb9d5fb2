"""How long a run is, and what is said of it before its first step."""

import pytest
import yaml

from runfiles import rows
from running import Sft
from sft.runs.identity import identity
from sft.runs.run import Run

SHORT = ("export=false", "data.val_size=0", "optimizer=sgd")  # 60 rows, 12 packs, 3 steps an epoch


def said(sft: Sft, capsys: pytest.CaptureFixture[str], *settings: str) -> list[str]:
    assert sft.train("run=run", *SHORT, *settings) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(at for at, line in enumerate(lines) if line.startswith("steps: "))
    return lines[start : next(at for at, line in enumerate(lines) if line.startswith("optimizer: "))]


def test_max_steps_means_that_many_steps(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(sft, capsys, "max_steps=7", "epochs=1")
    assert [row["step"] for row in rows(sft.run_folder())] == [str(step) for step in range(1, 8)]
    about, note = lines
    assert about.startswith(
        "steps: 7, or 2.33 epochs of 3 (max_steps decides, not epochs=1); each sees about 20 samples, "
    )
    assert note == "note: 7 steps teach a model little: set max_steps=100 or a higher optimizer.lr"


def test_half_an_epoch(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(sft, capsys, "epochs=0.5")
    assert lines[0].startswith("steps: 2, or 0.667 epochs of 3; each sees about 20 samples, ")
    assert lines[1].startswith("note: 2 steps teach a model little: set epochs=34, ")
    assert [row["step"] for row in rows(sft.run_folder())] == ["1", "2"]


def test_a_small_file_has_steps_enough_by_default(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("global_batch_size=null", "micro_batch_size=1", "data.max_length=512")
    lines = said(sft, capsys, *settings)
    assert len(lines) == 1
    num_steps = Run(sft.run_folder()).status["num_steps"]
    assert num_steps >= 48
    per_epoch = num_steps // 3
    assert lines[0].startswith(f"steps: {num_steps}, or 3 epochs of {per_epoch}; each sees about {60 / per_epoch:.3g} ")
    fills = [float(row["train/pack_fill"]) for row in rows(sft.run_folder())]
    assert max(fills) <= 1 and sum(fills) / num_steps > 0.8


def test_a_run_that_hardly_moved_says_so(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    hint = ": it hardly moved, so try a higher optimizer.lr or more steps\n"
    assert sft.train("run=slow", "export=false", "max_steps=1", "optimizer.lr=1e-7") == 0
    assert hint in capsys.readouterr().out
    assert sft.train("run=fast", "export=false", "max_steps=3") == 0
    assert hint not in capsys.readouterr().out


def test_a_step_left_open_is_the_same_on_two_ranks(sft: Sft) -> None:
    settings = (
        *sft.settings,
        *SHORT,
        "global_batch_size=null",
        "micro_batch_size=1",
        "max_steps=3",
        "data.packing=false",
    )
    assert sft("train", *settings, "run=one") == 0
    ended = sft.process("train", *settings, "run=two", "strategy=ddp", "trainer.devices=2")
    assert ended.code == 0, ended.output
    one, two = ([float(row["train/loss"]) for row in rows(sft.run_folder(run))] for run in ("one", "two"))
    assert two == pytest.approx(one, abs=2e-6)


def test_a_run_begun_when_a_step_was_16_packs_keeps_them(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("name=old", *SHORT, "epochs=2", "micro_batch_size=1", "data.max_length=64")
    assert (
        sft.train(
            *command,
            "global_batch_size=16",
            "max_time=100:00:00",
            "+callbacks.up={_target_: mishaps.TimeIsUp, step: 2}",
        )
        == 75
    )
    (before,) = (sft.folder / "runs").iterdir()
    assert sft.train(*command, "global_batch_size=null") == 0
    assert [folder.name for folder in (sft.folder / "runs").iterdir()] == [before.name]
    assert f"run runs/{before.name}: " in capsys.readouterr().out
    assert sft.train(*command, "global_batch_size=null", "seed=1", "max_steps=1") == 0
    (new,) = set((sft.folder / "runs").iterdir()) - {before}
    assert yaml.safe_load((new / "config.yaml").read_text())["global_batch_size"] is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule.warmup=3"], "schedule.warmup=3 takes the run's 3 steps or more"),
        (["schedule=constant", "schedule.warmup=500"], "schedule.warmup=500 takes the run's 3 steps or more"),
        (
            ["schedule=warmup_stable_decay", "schedule.warmup=1", "schedule.decay=3"],
            "schedule.warmup=1 and schedule.decay=3 take the run's 3 steps or more",
        ),
    ],
)
def test_a_warm_up_that_never_ends_is_refused(
    settings: list[str], message: str, sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train("run=run", *SHORT, "epochs=1", *settings) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft: ")]
    advice = "set it lower, or to a share of the run like 0.03"
    assert line == f"sft: {message}, so the learning rate would never be optimizer.lr: {advice}"
    assert not sft.run_folder().exists()


def test_phases_that_just_fit_are_taken(sft: Sft) -> None:
    phases = ("schedule=warmup_stable_decay", "schedule.warmup=1", "schedule.decay=2")
    assert sft.train("run=run", *SHORT, "epochs=1", *phases) == 0
    assert [float(row["train/lr"]) for row in rows(sft.run_folder())] == pytest.approx([0.005, 0.01, 0.005])


def test_whole_epochs_count_alike_however_they_are_written() -> None:
    assert identity({"epochs": 3}) == identity({"epochs": 3.0}) != identity({"epochs": 0.5})
