"""A run whose time is up is interrupted and ends as if nothing had happened; one that a callback ends says why."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from runfiles import final_files, last_checkpoint, rows
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.cluster import submitit_rank
from sft.commands import job
from sft.errors import UserError
from sft.runs import events, signals
from sft.runs.results import Result
from sft.runs.run import Run, Status

SETTINGS = ("epochs=2", "val_every=4", "checkpoint.save_every=4", "micro_batch_size=1", "run=run")
TARGET = "sft.proof.rehearsal.SignalInStep"
TIME_IS_UP = "+callbacks.up={_target_: mishaps.TimeIsUp, step: 3}"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("4:00:00", 14400), ("0:00:05", 5), ("1:12:00:00", 129600), ("100:00:01", 360001), (None, math.inf)],
)
def test_a_time(text: str | None, seconds: float) -> None:
    assert signals.seconds(text) == seconds


# Unquoted in a YAML file, 4:00:00 is the number 14400 and 1:12:00:00 another time.
@pytest.mark.parametrize("text", ["12", 14400, "10:30", "4:60:00", "-1:00:00", "0:00:00", "1-12:00:00", "soon"])
def test_no_time(text: object) -> None:
    with pytest.raises(UserError, match=rf"max_time={text} is no time: set it like 4:00:00 .* needs quotes"):
        signals.seconds(text)


def test_the_time_runs_from_the_start_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("sft.runs.signals.time.monotonic", lambda: now)
    monkeypatch.setattr("sft.runs.signals.signal.signal", lambda number, handler: None)
    signals.install()
    now = 130.0  # the imports
    signals.stop_after(60)
    assert signals.received() == 0
    now = 160.0
    assert signals.received() == signals.MAX_TIME
    signals.install()
    assert signals.received() == 0


def interrupted(sft: Sft, step: int, reason: str, stopped: str, why: str = "") -> None:
    folder = sft.run_folder()
    assert f"stopped by {reason} after step {step}: the same command resumes it" in stopped.splitlines()
    assert "Traceback" not in stopped
    status = Run(folder).status
    assert (status["state"], status["step"], status["num_steps"]) == ("interrupted", step, 6)
    assert (last_checkpoint(folder).step, last_checkpoint(folder).state["stopped"]) == (step, False)
    assert [event["why"] for event in events.read(folder) if event["event"] in ("time_up", "by_hand")] == [
        why or f"{reason} is over"
    ]
    assert not (folder / "export").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Iterator[Path]:
    """The folder of a run that nothing stops."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("whole"), model_folder, data_file, monkeypatch)
        assert sft.train(*SETTINGS) == 0
        yield sft.run_folder()


@pytest.mark.parametrize(
    ("reason", "time"),
    [
        ("max_time", "max_time=100:00:00"),
        ("Timer", "+callbacks.timer={_target_: lightning.pytorch.callbacks.Timer, duration: '01:00:00:00'}"),
    ],
)
def test_a_run_whose_time_is_up_goes_on_as_if_nothing_had_happened(
    sft: Sft, whole: Path, reason: str, time: str, capfd: pytest.CaptureFixture[str]
) -> None:
    command = (*SETTINGS, time, TIME_IS_UP)
    assert sft.train(*command) == 75
    interrupted(sft, 3, reason, capfd.readouterr().out)
    assert sft.train(*command) == 0  # the time of this process begins anew
    assert final_files(sft.run_folder()) == final_files(whole)
    assert rows(sft.run_folder()) == rows(whole)


def test_time_that_is_up_in_a_validation(sft: Sft, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stops = f"+callbacks.stops={{_target_: mishaps.InValidation, step: 4, once: {sft.folder}/stopped, time: true}}"
    assert sft.train(*SETTINGS, "max_time=100:00:00", stops) == 75
    stopped = capsys.readouterr().out
    interrupted(sft, 4, "max_time", stopped)
    assert "step 4: validation loss" not in stopped
    assert sft.train(*SETTINGS) == 0
    assert final_files(sft.run_folder()) == final_files(whole)
    assert rows(sft.run_folder()) == rows(whole)


TIMER = "+callbacks.timer={_target_: lightning.pytorch.callbacks.Timer, duration: '01:00:00:00'}"


@pytest.mark.parametrize("time", ["max_time=100:00:00", TIMER])
def test_two_ranks_of_which_the_first_has_no_time_left(sft: Sft, time: str) -> None:
    settings = ("train", *sft.settings, *SETTINGS, "strategy=ddp", "trainer.devices=2", time)
    stopped = sft.process(*settings, TIME_IS_UP)
    assert stopped.code == 75, stopped.output
    interrupted(sft, 3, "max_time" if time.startswith("max_time") else "Timer", stopped.output)
    assert sft.process(*settings).code == 0


def test_max_time_itself(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    waits = f"+callbacks.waits={{_target_: mishaps.UntilSignal, step: 2, once: {sft.folder}/waited}}"
    assert sft.train(*SETTINGS, "max_time=0:00:03", waits) == 75
    assert "stopped by max_time after step " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "reason"), [("SIGINT", "Ctrl-C"), ("SIGHUP", "SIGHUP")])
def test_a_run_stopped_by_hand_is_saved_and_resumes(
    sft: Sft, whole: Path, name: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    by_default(signal.Signals[name])
    assert sft.train(*SETTINGS, f"+callbacks.signal={{_target_: {TARGET}, step: 3, name: {name}}}") == 130
    printed = capfd.readouterr()
    assert "sft: saves at the end of this step and stops; Ctrl-C again: stops at once" in printed.err
    assert "step 3: saved runs/run/checkpoints/step-00000003" in printed.out
    interrupted(sft, 3, reason, printed.out, why=reason)
    assert sft.train(*SETTINGS) == 0
    assert final_files(sft.run_folder()) == final_files(whole)
    assert rows(sft.run_folder()) == rows(whole)


def test_two_ranks_of_which_one_is_stopped_by_hand(sft: Sft) -> None:
    settings = ("train", *sft.settings, *SETTINGS, "strategy=ddp", "trainer.devices=2")
    stops = f"+callbacks.signal={{_target_: {TARGET}, step: 3, rank: 0, name: SIGINT}}"
    stopped = sft.process(*settings, stops, before=partial(by_default, signal.SIGINT))
    assert stopped.code == 130, stopped.output
    interrupted(sft, 3, "Ctrl-C", stopped.output, why="Ctrl-C")


def test_a_second_ctrl_c_ends_at_once(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_default(signal.SIGINT)
    monkeypatch.setattr(signals, "ONCE", 0.0)
    twice = [f"+callbacks.{n}={{_target_: {TARGET}, step: 5, name: SIGINT}}" for n in ("first", "second")]
    assert sft.train(*SETTINGS, *twice) == 130
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "sft: interrupted; the same command resumes from the last checkpoint"
    assert "Traceback" not in printed.out + printed.err and "graceful" not in printed.out + printed.err
    assert (Run(sft.run_folder()).status["state"], last_checkpoint(sft.run_folder()).step) == ("interrupted", 4)


def test_what_a_launcher_passes_on_is_no_second_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Callable[..., None]] = {}
    monkeypatch.setattr("sft.runs.signals.signal.getsignal", lambda number: signal.default_int_handler)
    monkeypatch.setattr("sft.runs.signals.signal.signal", handlers.__setitem__)
    now = 5.0
    monkeypatch.setattr("sft.runs.signals.time.monotonic", lambda: now)
    signals.install()
    signals.save_first(True)
    handlers[signal.SIGINT](signal.SIGINT, None)
    now = 5.9
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert signals.received() == signals.SIGINT
    now = 8.0
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGINT](signal.SIGINT, None)
    signals.install()  # no step to save yet
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGHUP](signal.SIGHUP, None)
    assert signals.received() == 0


def test_nohup_stays_without_a_hangup(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, object] = {}
    monkeypatch.setattr("sft.runs.signals.signal.getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr("sft.runs.signals.signal.signal", handlers.__setitem__)
    signals.install()
    assert set(handlers) == {signal.SIGUSR1, signal.SIGTERM}


def test_a_job_that_has_failed_too_often_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    causes = "signal lost timeout killed hung out_of_memory not_finite failed disk_full misconfigured"
    events.record(tmp_path, "job", max_requeues=dict.fromkeys(causes.split(), 0))
    with pytest.raises(SystemExit, match="1"):
        job.end(Run(tmp_path), 1, tmp_path / "log")
    stop, alert = events.read(tmp_path)[-2:]
    assert (stop["event"], alert["event"], alert["title"]) == ("stop", "alert", "Not requeued")
    assert stop["why"] in alert["text"]


def by_default(number: int) -> None:
    """The signal isn't ignored, as it is in a job of a shell in the background."""
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    signal.signal(number, handler)


@pytest.mark.parametrize("event", ["time_up", "by_hand", "signal"])
def test_a_job_is_requeued_after_a_signal_and_not_when_its_user_has_ended_it(
    event: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    events.record(tmp_path, "job", max_requeues={"signal": 100})
    events.record(tmp_path, event, step=3, why="max_time is over")
    if event == "signal":
        with pytest.raises(SystemExit) as ended:
            job.end(Run(tmp_path), 75, tmp_path / "log")
        assert ended.value.code == 75
        return
    with pytest.raises(SystemExit, match="1"):
        job.end(Run(tmp_path), 75, tmp_path / "log")
    last = events.read(tmp_path)[-1]
    assert (last["event"], last["cause"], last["why"]) == ("stop", event, "max_time is over")
    assert "max_time is over; submit the job again to resume" in capsys.readouterr().out


def test_a_sweeps_job_whose_time_is_up_is_not_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.runs.signals.install", lambda: None)
    monkeypatch.setattr("atexit.register", lambda function: None)
    monkeypatch.setattr(submitit_rank, "requeue", lambda: pytest.fail("it was requeued"))
    with pytest.raises(RuntimeError, match="stopped by max_time after step 3"), submitit_rank.rank():
        raise signals.Interrupted(signals.MAX_TIME, 3)


def finished_early(sft: Sft, reason: str, capsys: pytest.CaptureFixture[str], *command: str) -> Status:
    """Trains, sees the reason, which begins so, wherever it belongs, and returns the run's status."""
    assert sft.train(*command) == 0
    printed, status = capsys.readouterr().out.splitlines(), Run(sft.run_folder()).status
    assert status["state"] == "finished"
    assert status["stopped_early"].startswith(reason)
    reason = status["stopped_early"]
    after = f"after {status['step']} of {status['num_steps']} steps: {reason}"
    assert f"step {status['step']}: stopped early: {reason}" in printed
    assert f"finished runs/run {after}" in printed
    assert last_checkpoint(sft.run_folder()).step == status["step"]
    assert sft.train(*command) == 0
    assert f"  it ended {after}" in capsys.readouterr().out.splitlines()
    return status


def test_early_stopping_says_why(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    stop = ("callbacks=early_stopping", "callbacks.early_stopping.patience=2", "optimizer.lr=1e-12", "val_every=1")
    monitored = "early stopping: val/loss did not improve in the last 2 validations. Best score: "
    assert finished_early(sft, monitored, capsys, *SETTINGS, *stop)["step"] == 3
    assert (sft.run_folder() / "export" / "verified.json").exists()


@pytest.mark.parametrize("val_size", [0.05, 0])
def test_a_callback_that_ends_the_run_within_a_step_ends_it_after_the_step(
    sft: Sft, val_size: float, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = ("+callbacks.stops={_target_: mishaps.StopsIn, number: 6}", f"data.val_size={val_size}", "export=false")
    assert finished_early(sft, "StopsIn stopped it", capsys, *SETTINGS, *stop)["step"] == 2
    assert bool(rows(sft.run_folder())[-1]["val/loss"]) is bool(val_size)


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            "callbacks.early_stopping.monitor=val/los",
            "EarlyStopping monitors val/los, which is not measured: set its monitor to val/loss or "
            "another metric of docs/metrics.md",
        ),
        (
            "data.val_size=0",
            "EarlyStopping never stops a run that has no validation data: set data.val_size or data.val_path, or leave "
            "the callback out",
        ),
    ],
)
def test_early_stopping_that_can_not_work(
    sft: Sft, setting: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train(*SETTINGS, "callbacks=early_stopping", setting) == 2
    printed = capsys.readouterr()
    assert printed.err == f"sft: {line}\n"
    assert "step 1" not in printed.out
    assert not list(sft.folder.glob("runs/*"))


def test_a_metric_of_the_users_own_may_be_monitored(sft: Sft) -> None:
    """It is measured in training, so the validation before training doesn't know it."""
    own = "+callbacks.own._target_=observers.OwnMetric"
    monitor = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=own", own)
    assert sft.train(*SETTINGS, *monitor, "export=false") == 0
    assert json.loads((sft.run_folder() / "status.json").read_text())["step"] == 6


def test_a_wrong_metric_of_a_resumed_run_is_a_users_mistake_too(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train(*SETTINGS, TIME_IS_UP, "max_time=100:00:00") == 75
    wrong = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=val/los")
    assert sft.train(*SETTINGS, *wrong) == 2
    assert "EarlyStopping monitors val/los, which is not measured" in capsys.readouterr().err


RISING = (
    "callbacks=early_stopping",
    "callbacks.early_stopping.patience=1",
    "+callbacks.losses={_target_: mishaps.Losses, of: {0: 6.0, 2: 5.0, 4: 7.0, 6: 8.0, 8: 9.0, 9: 9.0}}",
)


def test_the_best_is_exported_where_early_stopping_ends_the_run(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("run=run", "epochs=3", "val_every=2", "checkpoint.save_every=5", *RISING)
    assert sft.train(*settings) == 0
    line = "  exported          step 2, the best: validation loss 5.0000 (the last, step 4: 7.0000)\n"
    assert line in capsys.readouterr().out
    folder = sft.run_folder()
    assert [each.step for each in complete(folder / "checkpoints")] == [2, 4]
    assert Run(folder).status["exported"] == 2
    assert json.loads((folder / "export" / "verified.json").read_text())["step"] == 2
    assert "| step | 2 of 9, the best |" in (folder / "export" / "README.md").read_text()
    result = Result.read(Run(folder))
    assert (result.last, result.best) == (5.0, 5.0)


def test_more_patience_continues_a_run_that_was_stopped_early(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("run=run", "epochs=3", "val_every=2", "checkpoint.save_every=5", "export=false", *RISING)
    assert sft.train(*settings) == 0
    assert sft.train(*settings) == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert sft.train(*settings, "callbacks.early_stopping.patience=2") == 0
    printed = capsys.readouterr().out
    assert "it was stopped early at step 4, and continues with callbacks.early_stopping.patience=2, not 1\n" in printed
    # Of two validations without improvement one was before it was stopped.
    assert "did not improve in the last 2 validations" in Run(sft.run_folder()).status["stopped_early"]
    assert Run(sft.run_folder()).status["step"] == 6
    assert sft.train(*settings, "callbacks.early_stopping.patience=1") == 0
    assert "is finished: nothing to do" in capsys.readouterr().out
    assert sft.train(*settings, "~callbacks.early_stopping") == 0
    assert "continues without callbacks.early_stopping\n" in capsys.readouterr().out
    assert [row["step"] for row in rows(sft.run_folder())] == [str(step) for step in range(10)]
    assert "stopped_early" not in Run(sft.run_folder()).status


@pytest.mark.parametrize(
    ("losses", "export", "line"),
    [
        (
            {0: 4.0, 2: 5.0, 4: 7.0, 6: 6.0},
            "null",
            "step 6, the last: validation loss 6.0000 (the best, step 2: 5.0000; checkpoint.export=best exports it); "
            "the model was better before training: 4.0000",
        ),
        (
            {0: 9.0, 2: math.nan, 4: 5.0, 6: 5.0},
            "best",
            "step 4, the best: validation loss 5.0000 (the last, step 6: 5.0000)",
        ),
    ],
)
def test_which_step_a_run_gives_is_said(
    sft: Sft, losses: dict[int, float], export: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made = f"+callbacks.losses={{_target_: mishaps.Losses, of: {losses}}}"
    settings = ("run=run", "epochs=2", "val_every=2", "checkpoint.save_every=5", f"checkpoint.export={export}", made)
    assert sft.train(*settings, "export=false") == 0
    assert f"  to export         {line}\n" in capsys.readouterr().out


def test_a_best_that_was_not_saved_is_never_another(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    losses = "+callbacks.losses={_target_: mishaps.Losses, of: {0: 9, 2: 5.0, 4: 7.0, 5: 8.0}}"
    settings = ("run=run", "max_steps=5", "val_every=2", "checkpoint.save_every=4", "export=false", losses)
    assert sft.train(*settings) == 0
    assert sft("export", "run=run", "checkpoint=best") == 2
    assert (
        "the best of runs/run is step 2 with validation loss 5.0000, which was not saved (checkpoint.export=best saves "
        "it); the best that was is step 4: set checkpoint=4" in capsys.readouterr().err
    )
    assert sft.train(*settings, "checkpoint.export=best", "run=other") == 0
    assert [each.step for each in complete(sft.run_folder("other") / "checkpoints")] == [2, 4, 5]


def test_what_compares_validations_without_any_is_refused_before_torch_is_imported(
    sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft.train("run=run", "data.val_size=0", "checkpoint.export=best") == 2
    assert capsys.readouterr().err.startswith("sft: checkpoint.export=best is the lowest validation loss, and the run")


def test_a_job_whose_ranks_never_started_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun can end with 0 all the same."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    events.record(tmp_path, "job", max_requeues={"failed": 0})
    with pytest.raises(SystemExit, match="1"):
        job.end(Run(tmp_path), 0, tmp_path / "log")
    assert events.read(tmp_path)[-2]["error"] == "a rank ended: exit code 0"
    (tmp_path / "status.json").write_text('{"state": "finished"}')
    job.end(Run(tmp_path), 0, tmp_path / "log")


def test_a_killed_batch_script_is_judged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    events.record(tmp_path, "job", max_requeues={"killed": 3})
    for code in (75, 1):  # the second time the guard finds the verdict there
        with pytest.raises(SystemExit, match=str(code)):
            job.end(Run(tmp_path), None, tmp_path / "log")
    assert [(event["event"], event.get("cause")) for event in events.read(tmp_path)] == [
        ("job", None),
        ("requeue", "killed"),
    ]
