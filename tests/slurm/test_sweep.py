"""Sweeps as jobs of a cluster."""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import Cluster, eventually
from running import Sft
from sft.cluster.submitit_watcher import Watcher
from sft.commands.job import pick
from sft.errors import UserError

pytestmark = [pytest.mark.xdist_group("slurm too"), pytest.mark.timeout(600)]

ROOT = Path(__file__).resolve().parents[2]
SFT = str(Path(sys.executable).with_name("sft"))
SETTINGS = ["optimizer.lr=1e-5,2e-5", "data.path='a b'", "seed=0,1,2"]


def test_settings_are_counted_with_the_last_varying_first() -> None:
    picked = [pick(index, SETTINGS) for index in range(6)]
    assert picked[0] == ["optimizer.lr=1e-05", "data.path='a b'", "seed=0"]
    assert picked[1] == ["optimizer.lr=1e-05", "data.path='a b'", "seed=1"]
    assert picked[5] == ["optimizer.lr=2e-05", "data.path='a b'", "seed=2"]


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_beyond_them_names_the_right_array(index: int) -> None:
    with pytest.raises(UserError, match=r"these are 6 settings, sbatch --array=0-5$"):
        pick(index, SETTINGS)


def batch(folder: Path, index: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """sweep.sbatch as bash runs it, with a train.sbatch that prints what it is given."""
    (folder / "slurm").mkdir()
    (folder / "slurm" / "site.sh").write_text('here() { "$@"; }\n')
    (folder / "slurm" / "train.sbatch").write_text("printf '<%s>\\n' \"$@\"\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": index, "PATH": path}
    command = ["bash", ROOT / "slurm" / "sweep.sbatch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_job_of_the_array_trains_its_setting(tmp_path: Path) -> None:
    ended = batch(tmp_path, "4", *SETTINGS)
    assert ended.stdout.splitlines()[1:] == ["<optimizer.lr=2e-05>", "<data.path='a b'>", "<seed=1>"], ended.stderr


@pytest.mark.parametrize(("index", "message"), [("6", "sbatch --array=0-5"), ("", "a sweep is a job array")])
def test_a_job_that_has_no_setting_trains_nothing(tmp_path: Path, index: str, message: str) -> None:
    ended = batch(tmp_path, index, *SETTINGS)
    assert ended.returncode
    assert message in ended.stderr
    assert "<" not in ended.stdout


def test_one_job_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    for name, body in {
        "sft": "[ $2 = end ] || echo run; exit 75",  # a signal came before the ranks' start
        "scontrol": "echo scontrol \"$@\" >>calls; echo '   JobState=RUNNING'",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "slurm").mkdir()
    shutil.copy(ROOT / "slurm" / "site.sh", tmp_path / "slurm")
    # Of the array's last job the two numbers are the same.
    job = {"SLURM_JOB_ID": "21", "SLURM_ARRAY_JOB_ID": "21", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = os.environ | job | {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"}
    environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    ended = subprocess.run(["bash", ROOT / "slurm" / "train.sbatch"], cwd=tmp_path, env=environment)
    assert ended.returncode == 75
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "scontrol requeue 21_1" in calls
    assert all("21_1" in call for call in calls if "show job" in call)


def test_a_job_resumes_after_a_signal_and_the_sweep_ends_with_the_table(cluster: Cluster, sft: Sft) -> None:
    job = ("hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.cpus_per_task=1")
    # In one of them the second rank gets a signal in step 3; the other is finished already, on one rank.
    signal = "{_target_: sft.proof.rehearsal.SignalInStep, step: ${seed}, rank: 1, name: SIGUSR1}"
    small = ("micro_batch_size=1", "max_steps=6", "epochs=2", "export=false", "name=x")
    assert sft.train(*small, "seed=99") == 0
    settings = [*sft.settings, *small, *job, "strategy=ddp", "seed=3,99", f"+callbacks.signal={signal}"]
    swept = cluster.exec(SFT, "train", "-m", *settings, cwd=sft.folder)
    assert swept.returncode == 0, swept.stdout + swept.stderr
    rows = [line.split() for line in swept.stdout.splitlines() if line.startswith("x-")]
    assert [row[1:3] for row in rows] == [["finished", "6/6"]] * 2, swept.stdout
    assert sorted(row[-1] for row in rows) == ["3", "99"]
    assert float(rows[0][3]) <= float(rows[1][3])
    for row in rows:
        with (sft.run_folder(row[0]) / "metrics.csv").open(newline="") as file:
            assert [line["step"] for line in csv.DictReader(file)] == [str(step) for step in range(7)]
    logs = sorted((sft.folder / "runs" / ".multirun" / ".submitit").glob("*/*_0_log.out"))
    assert len(logs) == 2
    for line in ("stopped by SIGUSR1 after step 3", "resumed after step 3", "is finished: nothing to do"):
        assert sorted(line in log.read_text() for log in logs) == [False, True]


def submission(sft: Sft, run: str, *options: str) -> list[str]:
    """`sft submit` of a run on one rank."""
    job = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", *options]
    folders = [f"runs_dir={sft.folder}/runs", f"data.cache_dir={sft.folder}/cache"]
    return [SFT, "submit", *job, "--", *sft.settings, *folders, f"run={run}"]


def sweep(sft: Sft, run: str, *settings: str) -> list[str]:
    """A sweep of one setting, as a job."""
    return [SFT, "train", "-m", *sft.settings, f"run={run}", "hydra/launcher=slurm", *settings]


def test_a_sweep_sees_a_submitted_job_whatever_its_name(cluster: Cluster, sft: Sft) -> None:
    submitted = cluster.exec(*submission(sft, "one", "--hold", "--job-name=other"))
    assert submitted.returncode == 0, submitted.stderr
    job = submitted.stdout.split("job ")[1].split()[0]
    swept = cluster.exec(*sweep(sft, "one"), cwd=sft.folder)
    cluster.exec("scancel", job)
    assert (swept.returncode, swept.stdout) == (2, "")
    assert f"job {job} (PENDING) trains runs/one already: let it, or end it first with scancel {job}" in swept.stderr


def test_a_submission_sees_the_waiting_job_of_a_sweep(cluster: Cluster, sft: Sft) -> None:
    hold = "+hydra.launcher.additional_parameters.hold=true"
    with cluster.background(*sweep(sft, "one", hold, "hydra.launcher.cpus_per_task=1"), cwd=sft.folder):
        eventually(lambda: cluster.exec("squeue", "--noheader", "--name=one").stdout != "")
        job = cluster.exec("squeue", "--noheader", "--name=one", "--format=%A").stdout.strip()
        refused = cluster.exec(*submission(sft, "one"))
    cluster.exec("scancel", job)
    assert refused.returncode == 2
    assert f"job {job} (PENDING) trains {sft.run_folder('one')} already" in refused.stderr


def test_a_job_has_ended_when_the_controller_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = Watcher()
    for job in ("1", "2", "3", "4"):
        watcher.register_job(job)
    shown = "1|COMPLETING\n2|CANCELLED\n3|CONFIGURING\n9|FAILED\n"
    assert watcher.read_info(shown)["4"]["State"] == "RUNNING"  # once is a hitch
    later = time.monotonic() + 16
    monkeypatch.setattr(time, "monotonic", lambda: later)
    infos = watcher.read_info(shown)
    assert {job: info["State"] for job, info in infos.items()} == {
        "1": "RUNNING",
        "2": "CANCELLED",
        "3": "RUNNING",
        "4": "GONE",
    }
