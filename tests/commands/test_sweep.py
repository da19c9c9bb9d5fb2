"""Sweeps in this process: all combinations, and Optuna with its pruning."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.runs.run import Run
from sft.training.pruning import Pruning, journal

QUICK = ("max_steps=4", "val_every=2", "export=false", "logger=csv")


def test_a_setting_that_fails_hides_no_other(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    good = sft.settings[1].removeprefix("data.path=")
    assert sft("train", "-m", *sft.settings, *QUICK, f"data.path=missing.jsonl,{good}", "seed=3,4", "name=x") == 1
    shown = capsys.readouterr()
    assert shown.err.count("missing.jsonl") == 2
    assert "Traceback" not in shown.err
    rows = [line.split() for line in shown.out.splitlines() if line.startswith("x-")]
    assert [row[1] for row in rows[:4]] == ["finished", "finished", "failed", "failed"], shown.out
    losses = [float(row[3]) for row in rows[:2]]
    assert losses == sorted(losses)
    assert len(list(Path("runs").glob("x-*/metrics.csv"))) == 2
    assert not list(Path().glob("multirun*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("seed=1,2", "trainer.devices=2", "strategy=ddp"), "the trainer has 2 ranks: set hydra/launcher=slurm, or"),
        (("seed=1,2", "run=one"), "seed=1 and seed=2 are the same run, runs/one"),
        (("micro_batch_size=1,2",), "are the same run"),
        (("max_steps=1,-1",), "max_steps=-1 is not a whole number from 1 on"),
        (("hydra/sweeper=optuna", "seed=1"), "nothing varies: give an interval"),
    ],
)
def test_a_mistake_is_reported_before_the_first_setting_starts(
    sft: Sft, settings: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft("train", "-m", *sft.settings, *settings) == 2
    assert message in capsys.readouterr().err
    assert not list(Path("runs").glob("[a-z]*"))


def test_a_folder_in_which_slurm_expands_is_refused(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sft.cluster.slurm.check_installed", lambda: None)
    assert sft("train", "-m", *sft.settings, "hydra/launcher=slurm", "seed=1,2", "runs_dir=100%x") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "where Slurm expands %: set runs_dir to a folder without" in line and "100%x" in line


def optuna_sweep(sft: Sft, n_trials: int) -> int:
    study = ("hydra/sweeper=optuna", "hydra.sweeper.study=s", "hydra.sweeper.sampler.seed=1")
    pruner = ("hydra.sweeper.pruner.n_startup_trials=2", f"hydra.sweeper.n_trials={n_trials}")
    lr = "optimizer.lr=tag(log, interval(1e-4, 1e-1))"
    return sft("train", "-m", *sft.settings, *QUICK, *study, *pruner, lr, "name=x")


def trials() -> list[Any]:
    return optuna.load_study(study_name="s", storage=journal("runs/.multirun/optuna.journal")).trials


def test_optuna_prunes_and_resumes(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert optuna_sweep(sft, 3) == 0
    first, second, third = trials()  # the seed draws the lowest rate last
    assert [trial.state for trial in trials()] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED]
    assert third.params["optimizer.lr"] < first.params["optimizer.lr"] < second.params["optimizer.lr"]
    assert second.value < first.value
    assert list(first.intermediate_values) == list(third.intermediate_values) == [2]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("x-")]
    assert [row[1:3] for row in rows] == [["finished", "4/4"], ["finished", "4/4"], ["pruned", "2/4"]]
    assert float(rows[0][3]) == pytest.approx(second.value, abs=1e-4)
    # A trial that was drawn before its sweep was killed is trained, and then a new one.
    study = optuna.load_study(study_name="s", storage=journal("runs/.multirun/optuna.journal"))
    study.ask({"optimizer.lr": optuna.distributions.FloatDistribution(1e-4, 1e-1, log=True)})
    assert optuna_sweep(sft, 5) == 0
    assert [trial.state.is_finished() for trial in trials()] == [True] * 5
    assert "study s: 3 of 5 trials have ended" in capsys.readouterr().out
    assert len({trial.params["optimizer.lr"] for trial in trials()}) == 5


def begun(storage: str, losses: list[float]) -> int:
    """The number of a new trial in a study whose other trials had these losses at step 2."""
    study = optuna.create_study(study_name="s", storage=journal(storage))
    for loss in losses:
        other = study.ask()
        other.report(loss, 2)
        study.tell(other, loss)
    return study.ask().number


def test_a_repeated_step_is_reported_once(tmp_path: Path) -> None:
    storage = str(tmp_path / "journal")
    trial = begun(storage, [1.0, 2.0])
    callback = Pruning(storage, "s", trial, optuna.pruners.MedianPruner(n_startup_trials=1))
    assert not callback._is_bad(2, 1.25)
    assert not callback._is_bad(2, 7.0)
    study = optuna.load_study(study_name="s", storage=journal(storage))
    assert study.trials[trial].intermediate_values == {2: 1.25}
    assert callback._is_bad(3, float("nan"))


def test_two_ranks_end_a_trial_together(sft: Sft) -> None:
    trial = begun("journal", [0.1, 0.2])
    pruning = {"_target_": "sft.training.pruning.Pruning", "storage": "journal", "study": "s", "trial": trial}
    pruning |= {"pruner._target_": "optuna.pruners.MedianPruner", "pruner.n_startup_trials": 1}
    ended = sft.ranks(
        2,
        "train",
        *sft.settings,
        *QUICK,
        "run=run",
        "strategy=ddp",
        *(f"+callbacks.pruning.{key}={value}" for key, value in pruning.items()),
    )
    assert ended.code == 0, ended.output
    assert "step 2: stopped early: Pruning: other trials do better" in ended.output
    last = complete(sft.run_folder() / "checkpoints")[-1]
    assert (last.step, last.state["stopped"]) == (2, True)
    assert Run(sft.run_folder()).status["state"] == "finished"
