"""The faults of a cluster, which scripts/chaos --slurm starts on this machine: a batch job on two nodes meets one.
Where it isn't requeued it is submitted again, as by a user."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

from checks import chaos_judge as judge
from checks.chaos_faults import Kind
from checks.chaos_judge import HUNG, LOST, MISSED, SILENT, SURVIVED, TRACEBACK, Verdict
from checks.chaos_start import Ended
from checks.chaos_trial import LAYOUTS, SETTINGS, Trial
from cluster import Cluster
from sft.runs.run import Run

ROOT = Path(__file__).resolve().parents[2]
HANG_AFTER = 20  # seconds
LIMIT = 300.0  # seconds for a job with all its requeues
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL")
OPTIONS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1")
ALONE = threading.Lock()  # a node that is lost would be that of another trial's job, too
Hit = Callable[[Cluster, str, str, Random], bool]  # puts it to a job, and the first of its nodes; whether it met it


@contextmanager
def kinds(folder: Path) -> Iterator[list[Kind]]:
    """Those of a cluster that lives meanwhile."""
    cluster = Cluster(folder / "cluster").start(nodes=3, cpus=4)
    try:
        hits: dict[str, Hit] = {
            "node lost": lose,
            "job suspended longer than hang_after": suspend,
            "job signalled": send,
            "job requeued": lambda cluster, job, node, draw: done(cluster, "scontrol", "requeue", job),
            "job cancelled": lambda cluster, job, node, draw: done(cluster, "scancel", job),
            "batch shell killed": kill_shell,
        }
        if not cluster.hosts:  # without root a node is a daemon, not a machine
            hits = {name: hit for name, hit in hits.items() if hit not in (lose, kill_shell)}
        yield [Kind(name, on_a_job(cluster, name, hit), 1, ("ddp", "zero2")) for name, hit in hits.items()]
    finally:
        cluster.stop()


def done(cluster: Cluster, *command: str) -> bool:
    """Runs a command on the login node; one on a job that has ended fails."""
    return not cluster.exec(*command).returncode


def lose(cluster: Cluster, job: str, node: str, draw: Random) -> bool:
    lost = cluster("crash", node)
    time.sleep(12)  # until it is noticed
    cluster("boot", node)
    return not lost.returncode


def suspend(cluster: Cluster, job: str, node: str, draw: Random) -> bool:
    met = done(cluster, "scontrol", "suspend", job)
    time.sleep(HANG_AFTER * 1.5)
    done(cluster, "scontrol", "resume", job)
    return met


def send(cluster: Cluster, job: str, node: str, draw: Random) -> bool:
    where = draw.choice([[], ["--batch"], ["--full"]])
    return done(cluster, "scancel", f"--signal={draw.choice(['USR1', 'TERM'])}", *where, job)


def kill_shell(cluster: Cluster, job: str, node: str, draw: Random) -> bool:
    return not cluster("on", node, "pkill", "-KILL", "-f", f"job0*{job}/slurm_script").returncode


def on_a_job(cluster: Cluster, name: str, hit: Hit) -> Callable[[Trial, Random], Verdict]:
    def act(trial: Trial, draw: Random) -> Verdict:
        if not ALONE.acquire(blocking=False):
            trial.what = "the cluster is at another"
            return Verdict(MISSED)
        try:
            return on_the_cluster(trial, draw)
        finally:
            ALONE.release()

    def on_the_cluster(trial: Trial, draw: Random) -> Verdict:
        trial.copy(trial.reference.assets)
        paths = {"model.path=model", "data.path=rows.jsonl", "trainer.devices=2"}  # a job runs in the project's folder
        settings = [item for item in [*SETTINGS, *LAYOUTS[trial.reference.layout][1]][1:] if item not in paths]
        settings += [f"model.path={trial.folder}/model", f"data.path={trial.folder}/rows.jsonl"]
        settings += [f"runs_dir={trial.folder}/runs", f"data.cache_dir={trial.folder}/cache"]
        settings += [f"cluster.hang_after={HANG_AFTER}"]
        path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        options = (*OPTIONS, "--signal=USR1@30", "--time=10", f"--output={trial.folder}/%j.out")
        jobs = []

        def over(job: str) -> bool:
            return eventually(lambda: cluster.job(job)["JobState"] in OVER, LIMIT)

        def submit() -> str:
            jobs.append(cluster.submit(*options, "slurm/train.sbatch", *settings, cwd=ROOT, env=path))
            return jobs[-1]

        job = submit()
        if not eventually(lambda: cluster.job(job)["JobState"] == "RUNNING", LIMIT):
            return Verdict(HUNG, "the job did not begin")
        moment = draw.random() * 25
        node = cluster.exec("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).stdout.split()[0]
        trial.what = f"after {moment:.1f} s"
        time.sleep(moment)
        if cluster.job(job)["JobState"] != "RUNNING":
            return Verdict(MISSED)
        if not hit(cluster, job, node, draw):
            done(cluster, "scancel", job)
            return Verdict(MISSED)
        for _ in range(4):
            if not over(job):
                fields = cluster.job(job)
                done(cluster, "scancel", "--signal=KILL", "--full", job)
                done(cluster, "scancel", job)
                return Verdict(HUNG, f"after {LIMIT:.0f} s the job is {fields['JobState']}, {fields.get('Reason')}")
            state = cluster.job(job)["JobState"]
            output = "\n".join(log.read_text(errors="replace") for log in sorted(trial.folder.glob("*.out")))
            if line := judge.crashed(Ended([0], [output])):
                return Verdict(TRACEBACK, line)
            if Run(trial.run).status.get("state") == "finished":
                break
            if state == "COMPLETED":
                return Verdict(SILENT, "the job is COMPLETED and the run isn't finished")
            if "suspended" in name:
                return Verdict(LOST, f"the job is {state}: {(output.strip().splitlines() or [''])[-1][:200]}")
            job = submit()
        else:
            return Verdict(LOST, f"not finished by jobs {', '.join(jobs)}")
        difference = trial.reference.truth.differs(trial.run)
        if not difference and "suspended" in name and "restart 1" in output:
            return Verdict(LOST, "the job was requeued")
        return Verdict(SILENT, difference) if difference else Verdict(SURVIVED)

    return act


def eventually(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (held := condition()) and time.monotonic() < end:
        time.sleep(0.3)
    return held
