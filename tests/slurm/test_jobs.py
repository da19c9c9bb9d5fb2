"""Batch jobs on a real cluster: however they are interrupted, the run ends the same, bit for bit."""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import Cluster, eventually
from offline import history
from pages import COMMANDS, ROOT
from runfiles import final_files, rows
from running import Sft
from sft.runs import events

pytestmark = [pytest.mark.xdist_group("slurm"), pytest.mark.timeout(1200)]

SETTINGS = ("epochs=6", "val_every=4", "checkpoint.save_every=4", "micro_batch_size=1", "logger=csv")
NUM_STEPS = 18
TRACKED = "logger=wandb"
# What the documented command changes, put back.
DEMO = ("experiment=demo", "max_steps=null", "data.val_path=null", TRACKED)


class Jobs:
    """Batch jobs of slurm/train.sbatch in a folder of the test's."""

    def __init__(self, cluster: Cluster, sft: Sft) -> None:
        self.cluster, self.sft = cluster, sft

    def settings(self, run: str, *overrides: str) -> list[str]:
        runs = [f"runs_dir={self.sft.folder}/runs", f"data.cache_dir={self.sft.folder}/cache", f"run={run}"]
        return [*self.sft.settings, *SETTINGS, *runs, *overrides]

    def as_documented(self, line: str, *overrides: str) -> str:
        """Runs a line of the README or of docs/ on this cluster; what it printed."""
        (typed,) = [
            command for command in COMMANDS if re.match(rf"slurm/local-cluster (exec .*{line}|{line}$)", command)
        ]
        _, verb, *arguments = shlex.split(typed)
        path = {"PYTHONPATH": f"{ROOT}/tests", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = self.cluster(verb, *arguments, *overrides, cwd=ROOT, env=path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, run: str, nodes: int, tasks: int, *overrides: str, **options: str) -> str:
        given = {"nodes": nodes, "ntasks-per-node": tasks, "gpus-per-node": 0, "cpus-per-task": 1, **options}
        log = f"--output={self.sft.folder}/%j.out"
        sbatch = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        path = {"PYTHONPATH": f"{ROOT}/tests"}
        return self.cluster.submit(
            *sbatch, log, "slurm/train.sbatch", *self.settings(run, *overrides), cwd=ROOT, env=path
        )

    def gate(self, name: str, step: int) -> str:
        return f"+callbacks.{name}={{_target_: mishaps.Gate, step: {step}, path: {self.sft.folder}/{name}}}"

    def until_signal(self, name: str, step: int) -> str:
        return f"+callbacks.{name}={{_target_: mishaps.UntilSignal, step: {step}, once: {self.sft.folder}/{name}}}"

    def mishap(self, name: str, what: str, step: int, rank: int, once: bool) -> str:
        flag = f", once: {self.sft.folder}/{name}" if once else ""
        return f"+callbacks.{name}={{_target_: mishaps.Mishap, step: {step}, rank: {rank}, what: {what}{flag}}}"

    def reached(self, gate: str) -> None:
        """Waits until a job is at the gate."""
        path = self.sft.folder / f"{gate}.reached"
        eventually(path.exists)
        path.unlink()

    def open(self, gate: str) -> None:
        (self.sft.folder / gate).touch()

    def finished(self, job: str) -> str:
        """The job's log, when it has completed."""
        return Path(self.cluster.wait(job, "COMPLETED")["StdOut"]).read_text()

    def log(self, job: str) -> str:
        return (self.sft.folder / f"{job}.out").read_text()

    def whole(self, strategy: str, num_ranks: int, *overrides: str) -> Path:
        """The folder of an uninterrupted run."""
        folder = self.sft.run_folder(f"whole-{strategy}")
        if not folder.exists():
            settings = self.settings(folder.name, *overrides)
            ended = self.sft.ranks(num_ranks, "train", *settings, f"strategy={strategy}")
            assert ended.code == 0, ended.output
        return folder

    def story(self, run: str) -> list[dict[str, Any]]:
        return events.read(self.sft.run_folder(run))

    def verdicts(self, run: str) -> list[tuple[str, str, int]]:
        kinds = ("requeue", "stop", "finish")
        return [(e["event"], e.get("cause", ""), e["step"]) for e in self.story(run) if e["event"] in kinds]


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, tmp_path_factory: Any, model_folder: Path, data_file: Path) -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Jobs(cluster, Sft(tmp_path_factory.mktemp("jobs"), model_folder, data_file, monkeypatch))
    cluster.exec("scancel", "--state=RUNNING")
    cluster.exec("scancel", "--state=PENDING")
    cluster.wait_idle()


@pytest.fixture(scope="module")
def limited(jobs: Jobs) -> str:
    """A job that waits for its time limit while other tests go on."""
    signalled = jobs.until_signal("waits", 6)
    return jobs.submit("limited", 2, 2, "strategy=ddp", TRACKED, signalled, time="3", signal="USR1@60")


def equals_uninterrupted(jobs: Jobs, run: str, whole: Path) -> None:
    """The last checkpoint, the export and the metrics, to the byte; each step once in metrics.csv and in W&B."""
    folder = jobs.sft.run_folder(run)
    assert final_files(folder) == final_files(whole)
    assert rows(folder) == rows(whole)
    assert [row["step"] for row in rows(folder)] == [str(step) for step in range(NUM_STEPS + 1)]
    logged = history(folder)
    assert [row["trainer/global_step"] for row in logged] == list(range(NUM_STEPS + 1))
    assert [row["train/loss"] for row in logged[1:]] == [float(row["train/loss"]) for row in rows(whole)[1:]]


def interrupted(jobs: Jobs, job: str) -> str:
    """The log of the job, once it has been signalled, has lost a node and finished."""
    jobs.reached("first")
    assert "chaos" in jobs.as_documented("squeue")
    jobs.cluster.exec("scancel", "--signal=USR1", job)
    jobs.reached("second")
    nodes = jobs.cluster.exec("scontrol", "show", "hostnames", jobs.cluster.job(job)["NodeList"]).stdout.split()
    assert nodes == ["n1", "n2"]
    jobs.as_documented("crash n2")
    jobs.reached("second")
    assert jobs.cluster.exec("squeue", "--noheader", f"--job={job}", "--format=%N").stdout.strip() == "n[1,3]"
    jobs.as_documented("boot n2")
    jobs.open("second")
    return jobs.finished(job)


def test_signal_then_lost_node_then_killed_rank(jobs: Jobs, limited: str) -> None:
    kill = jobs.mishap("kill", "kill", 15, rank=1, once=True)
    jobs.open("first")
    gates = (jobs.gate("first", 6), jobs.until_signal("signalled", 6), jobs.gate("second", 10))
    more = jobs.settings("chaos", *DEMO)
    printed = jobs.as_documented("sft submit.*run=plug.*", *more, *gates, kill)
    (job,) = re.findall(r"^job +(\d+)", printed, re.M)
    assert f"  sft watch {jobs.sft.run_folder('chaos')} " in printed
    watch = (sys.executable, "-m", "sft", "watch", str(jobs.sft.run_folder("chaos")), "every=0.1")
    with jobs.cluster.background(*watch, cwd=ROOT, output=jobs.sft.folder / "watch.txt") as watching:
        log = interrupted(jobs, job)
        assert watching.wait(60) == 0
    causes = [("requeue", "signal", 6), ("requeue", "lost", 9), ("requeue", "killed", 14), ("finish", "", NUM_STEPS)]
    assert jobs.verdicts("chaos") == causes
    assert "requeued: killed at step 14 (rank 1 on n" in log
    assert f"wandb sync {jobs.sft.run_folder('chaos')}/wandb/offline-run-" in log
    starts = [event for event in jobs.story("chaos") if event["event"] == "start"]
    assert [(event["restart"], event["step"], event["num_ranks"]) for event in starts] == [
        (0, 0, 2), (1, 6, 2), (2, 8, 2), (3, 12, 2),
    ]  # fmt: skip
    assert starts[0]["hosts"] == ["n1", "n2"]
    states = re.findall(r"^chaos  (\w+) at step (\d+)$", (jobs.sft.folder / "watch.txt").read_text(), re.M)
    assert states[-1] == ("finished", str(NUM_STEPS))
    equals_uninterrupted(jobs, "chaos", jobs.whole("deepspeed_zero2", 2, *DEMO))


def test_hang_then_the_same_failure_twice_then_fewer_ranks(jobs: Jobs) -> None:
    hang = jobs.mishap("hang", "hang", 3, rank=1, once=True)
    fails = jobs.mishap("fails", "raise", 7, rank=1, once=False)
    job = jobs.submit("fails", 1, 2, "strategy=ddp", "cluster.hang_after=20", hang, fails)
    jobs.cluster.wait(job, "FAILED")
    assert jobs.verdicts("fails") == [("requeue", "hung", 2), ("requeue", "failed", 6), ("stop", "failed", 6)]
    last = jobs.log(job).splitlines()[-1]
    assert last.startswith("stopped: failed at step 6 (rank 1 on n"), last
    assert last.endswith("ArithmeticError: the mishap of rank 1; the same failure twice at step 6: a retry can't help")
    assert 'raise ArithmeticError(f"the mishap of rank' in jobs.log(job).splitlines()[-3]
    stacks = sorted((jobs.sft.run_folder("fails") / "logs" / job).glob("*.stack"))
    assert ["mishaps.py" in path.read_text() for path in stacks] == [False, True]
    # Submitted again without the mishaps, on one rank instead of two.
    again = jobs.submit("fails", 1, 1)
    assert "resumed after step 4" in jobs.finished(again)
    losses = [float(row["train/loss"]) for row in rows(jobs.sft.run_folder("fails"))[1:]]
    expected = [float(row["train/loss"]) for row in rows(jobs.whole("ddp", 4))[1:]]
    assert losses == pytest.approx(expected, abs=1e-5)


def test_a_job_whose_own_time_is_up_is_not_requeued(jobs: Jobs) -> None:
    job = jobs.submit("own-time", 1, 1, "max_time=1:00:00", "+callbacks.up={_target_: mishaps.TimeIsUp, step: 3}")
    jobs.cluster.wait(job, "FAILED")
    assert jobs.verdicts("own-time") == [("stop", "time_up", 3)]
    assert jobs.log(job).splitlines()[-1].endswith("max_time is over; submit the job again to resume")


def test_array_is_a_sweep(jobs: Jobs) -> None:
    runs = jobs.settings("null", "name=array", "optimizer.lr=1e-2,2e-2", "export=false")
    settings = [item for item in runs if not item.startswith("run=") and item != "optimizer.lr=1e-2"]
    options = ["--array=0-1", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    log = f"--output={jobs.sft.folder}/%A_%a.out"
    job = jobs.cluster.submit(*options, log, "slurm/sweep.sbatch", *settings, cwd=ROOT)
    for task in (0, 1):
        jobs.cluster.wait(f"{job}_{task}", "COMPLETED")
    runs = sorted(jobs.sft.folder.glob("runs/array-*"))
    rates = [yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["lr"] for run in runs]
    assert sorted(rates) == [0.01, 0.02]
    assert [jobs.verdicts(run.name) for run in runs] == [[("finish", "", NUM_STEPS)]] * 2


def test_a_cancelled_job_saves_and_is_not_requeued(jobs: Jobs) -> None:
    jobs.open("third")
    job = jobs.submit("cancelled", 1, 1, jobs.gate("third", 3), jobs.until_signal("cancel", 3))
    jobs.reached("third")
    jobs.cluster.exec("scancel", job)
    jobs.cluster.wait(job, "CANCELLED")
    eventually(lambda: bool(jobs.verdicts("cancelled")))
    assert jobs.verdicts("cancelled") == [("stop", "signal", 3)]
    assert (jobs.sft.run_folder("cancelled") / "checkpoints" / "step-00000003").is_dir()
    assert jobs.cluster.exec("squeue", "--noheader", f"--job={job}").stdout == ""


def test_killed_batch_script_leaves_a_verdict_and_is_requeued(jobs: Jobs) -> None:
    job = jobs.submit("shell", 1, 1, jobs.gate("fourth", 6))
    jobs.reached("fourth")
    kill = f"kill -KILL $(pgrep -f 'job0*{job}/[s]lurm_script')"
    jobs.cluster.exec("srun", f"--jobid={job}", "--overlap", "bash", "-c", kill)
    jobs.reached("fourth")
    assert jobs.cluster.job(job)["Restarts"] == "1"
    jobs.open("fourth")
    log = jobs.finished(job)
    assert jobs.verdicts("shell") == [("requeue", "killed", 5), ("finish", "", NUM_STEPS)]
    assert "\nrequeued: killed at step 5: the batch script was killed; 1 of cluster.max_requeues.killed=" in log


def test_folder_that_slurm_would_expand(jobs: Jobs) -> None:
    folder = jobs.sft.folder / "50%b"
    jobs.finished(jobs.submit("percent", 1, 1, f"runs_dir={folder}", "max_steps=1", "val_every=1", "export=false"))
    (errors,) = (folder / "percent" / "logs").glob("*/rank-0.err")
    assert errors.read_text().startswith("restart 0 on ")


def test_time_limit(jobs: Jobs, limited: str) -> None:
    jobs.finished(limited)
    *stops, last = jobs.verdicts("limited")
    assert last == ("finish", "", NUM_STEPS)
    # On a busy machine an attempt may also get its signal before step 6 or after it, or lose the node that another test
    # crashes.
    assert ("requeue", "signal", 6) in stops
    assert {(event, cause) for event, cause, _ in stops} <= {("requeue", "signal"), ("requeue", "lost")}
    equals_uninterrupted(jobs, "limited", jobs.whole("ddp", 4))


def test_export_is_a_job(jobs: Jobs) -> None:
    run, exported = jobs.whole("ddp", 4), jobs.sft.folder / "exported"
    options = ("--mem=1G", "--cpus-per-task=1", f"--output={jobs.sft.folder}/%j.out")
    settings = (f"run={run}", f"output={exported}")
    job = jobs.cluster.submit(*options, "slurm/export.sbatch", *settings, cwd=ROOT)
    jobs.finished(job)
    assert (exported / "verified.json").exists()
    assert (exported / "model.safetensors").read_bytes() == (run / "export" / "model.safetensors").read_bytes()


def test_bad_configuration_ends_at_once(jobs: Jobs) -> None:
    job = jobs.submit("bad", 1, 2, "strategy=ddp", "global_batch_size=3")
    assert jobs.cluster.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert jobs.log(job).splitlines()[-1].startswith("sft: a global batch of 3 packs")
    assert not jobs.sft.run_folder("bad").exists()


def test_outside_the_project_a_job_says_what_to_do(jobs: Jobs) -> None:
    job = jobs.cluster.submit(f"--output={jobs.sft.folder}/%j.out", "--ntasks-per-node=1", "--gpus-per-node=0",
                              "--cpus-per-task=1", f"{ROOT}/slurm/train.sbatch", cwd=jobs.sft.folder)  # fmt: skip
    jobs.cluster.wait(job, "FAILED")
    assert "submit from the project's folder" in jobs.log(job)
