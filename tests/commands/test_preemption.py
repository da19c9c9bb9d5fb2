"""A run that a signal stops saves where it is, says so, and goes on as if nothing had happened."""

import json
import signal
from functools import partial
from pathlib import Path

import pytest

import mishaps
from runfiles import final_files, rows
from running import Sft
from sft.checkpoint.checkpoint import complete
from warm import python

pytestmark = pytest.mark.xdist_group("preemption")  # the run that nothing stops is made once

SETTINGS = ("epochs=2", "val_every=4", "checkpoint.save_every=4", "micro_batch_size=1")
TARGET = "sft.proof.rehearsal.SignalInStep"


def in_step(step: int, rank: int = 0, name: str = "SIGUSR1") -> list[str]:
    return [f"+callbacks.signal={{_target_: {TARGET}, step: {step}, rank: {rank}, name: {name}}}"]


def check(sft: Sft, step: int, stopped: str, name: str = "SIGUSR1") -> None:
    folder = sft.run_folder()
    assert f"stopped by {name} after step {step}: the same command resumes it" in stopped.splitlines()
    assert "Traceback" not in stopped
    assert complete(folder / "checkpoints")[-1].step == step
    assert not complete(folder / "checkpoints")[-1].state["stopped"]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["num_steps"]) == ("interrupted", step, 6)
    assert not (folder / "export").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """The folder of a run that nothing stops."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("whole"), model_folder, data_file, monkeypatch)
        ended = sft.process("train", *sft.settings, *SETTINGS, "run=run")
    assert ended.code == 0, ended.output
    return sft.run_folder()


# Step 4 is validated and saved anyhow; of the last step only the export is left.
@pytest.mark.parametrize("step", [3, 4, 6])
def test_one_rank(sft: Sft, step: int, whole: Path) -> None:
    stopped = sft.process("train", *sft.settings, *SETTINGS, "run=run", *in_step(step))
    assert stopped.code == 75, stopped.output
    check(sft, step, stopped.output)
    again = sft.process("train", *sft.settings, *SETTINGS, "run=run")
    assert again.code == 0, again.output
    assert final_files(sft.run_folder()) == final_files(whole)
    assert [row["step"] for row in rows(sft.run_folder())] == [str(step) for step in range(7)]
    assert rows(sft.run_folder()) == rows(whole)


@pytest.mark.parametrize(("where", "validated"), [("InValidation", False), ("InSave", True)])
def test_signal_in_a_validation_or_a_save(sft: Sft, where: str, validated: bool, whole: Path) -> None:
    stops = f"+callbacks.stops={{_target_: mishaps.{where}, step: 4, once: {sft.folder}/stopped}}"
    stopped = sft.process("train", *sft.settings, *SETTINGS, "run=run", stops)
    assert stopped.code == 75, stopped.output
    check(sft, 4, stopped.output)
    assert ("step 4: validation loss" in stopped.output) is validated
    assert complete(sft.run_folder() / "checkpoints")[-1].state["validated"] is validated
    again = sft.process("train", *sft.settings, *SETTINGS, "run=run")
    assert again.code == 0, again.output
    assert ("step 4: validation loss" in again.output) is not validated
    assert rows(sft.run_folder()) == rows(whole)
    assert final_files(sft.run_folder()) == final_files(whole)


# Under ZeRO-2, and on several nodes: tests/slurm/test_jobs.py
def test_two_ranks_of_which_one_gets_the_signal(sft: Sft) -> None:
    settings = ("train", *sft.settings, *SETTINGS, "strategy=ddp", "trainer.devices=2")
    whole = sft.process(*settings, "run=whole")
    assert whole.code == 0, whole.output
    stopped = sft.process(*settings, "run=run", *in_step(3, rank=1, name="SIGTERM"))
    assert stopped.code == 75, stopped.output
    check(sft, 3, stopped.output, "SIGTERM")
    again = sft.process(*settings, "run=run")
    assert again.code == 0, again.output
    assert final_files(sft.run_folder()) == final_files(sft.run_folder("whole"))
    assert rows(sft.run_folder()) == rows(sft.run_folder("whole"))


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_signal_during_the_imports_is_remembered(sft: Sft, name: str) -> None:
    early = partial(mishaps.stopped_in_the_imports, signal.Signals[name])
    stopped = sft.process("train", *sft.settings, *SETTINGS, "run=run", before=early)
    assert stopped.code == 75, stopped.output
    assert f"stopped by {name} after step 0: the same command resumes it" in stopped.output
    assert not complete(sft.run_folder() / "checkpoints")
    assert sft.process("train", *sft.settings, *SETTINGS, "run=run").code == 0
    assert [row["step"] for row in rows(sft.run_folder())] == [str(step) for step in range(7)]


def test_processes_that_are_forked_have_no_share_in_it(sft: Sft) -> None:
    assert sft.process("--help", before=mishaps.signals_to_a_fork).code == 0


def test_signal_in_the_export_lets_it_end(sft: Sft) -> None:
    # To all processes of the job, as a scheduler sends it: the one that proves the export would die of it.
    program = sft.folder / "python"
    signalled = f'case "$*" in *sft.export.verify*) kill -TERM $PPID $$; echo >{sft.folder}/alive;; esac'
    lines = ["#!/bin/sh", signalled, f'exec {python().executable} "$@"', ""]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    during = partial(mishaps.starts_by, str(program))
    ended = sft.process("train", *sft.settings, *SETTINGS, "max_steps=1", "run=run", before=during)
    assert ended.code == 0, ended.output
    assert (sft.folder / "alive").exists()
    assert json.loads((sft.run_folder() / "status.json").read_text())["state"] == "finished"
