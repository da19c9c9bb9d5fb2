"""slurm/local-cluster: hosts as nodes, fake GPUs, a node's crash, and messages for mistakes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, eventually

pytestmark = [pytest.mark.xdist_group("slurm too"), pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A second cluster, which must not see the session's."""
    cluster = Cluster(tmp_path_factory.mktemp("own"))
    yield cluster.start(nodes=2, gpus=2)
    cluster.stop()


def test_nodes_are_hosts_with_gpus(own: Cluster) -> None:
    shown = own.exec(
        "srun", "--nodes=2", "--gpus-per-node=2", "sh", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    )
    assert sorted(shown.stdout.splitlines()) == [f"{node} 0,1" for node in own.nodes]
    if own.hosts:
        assert sorted(own.exec("srun", "--nodes=2", "hostname").stdout.split()) == own.nodes == ["n1", "n2"]
        # What one node starts, another does not see.
        assert own("on", "n1", "sh", "-c", "echo $$ >/dev/shm/x; ls /dev/shm").stdout == "x\n"
        assert own("on", "n2", "ls", "/dev/shm").stdout == ""


def test_exec_passes_all_through(own: Cluster, tmp_path: Path) -> None:
    done = own.exec("sh", "-c", "pwd; echo $GIVEN; exit 7", cwd=tmp_path, env={"GIVEN": "a b"})
    assert (done.returncode, done.stdout) == (7, f"{tmp_path}\na b\n")


def test_a_crashed_nodes_job_is_requeued_elsewhere(own: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text('#!/bin/sh\necho $SLURMD_NODENAME >>nodes\n[ "$SLURM_RESTART_COUNT" ] || exec sleep 100\n')
    job = own.submit("--requeue", "--output=/dev/null", str(script), cwd=tmp_path)
    crashed = own.wait(job, "RUNNING")["NodeList"]
    eventually((tmp_path / "nodes").exists)
    own("crash", crashed)
    assert own.wait(job, "COMPLETED")["Restarts"] == "1"
    assert (tmp_path / "nodes").read_text().split() == [crashed, *(node for node in own.nodes if node != crashed)]
    assert own("boot", crashed).returncode == 0
    own.wait_idle()


def test_preemptible_jobs_get_a_signal_first(own: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    step = 'trap "echo saved; exit 0" TERM; echo up; while :; do sleep 0.1; done'
    script.write_text(f"#!/bin/sh\nexec srun sh -c '{step}'\n")
    options = ["--exclusive", "--nodes=2", "--open-mode=append", f"--output={tmp_path}/%j.out"]
    job = own.submit("--partition=preemptible", "--requeue", *options, str(script))
    own.wait(job, "RUNNING")
    output = tmp_path / f"{job}.out"
    eventually(lambda: output.exists() and output.read_text().count("up") == 2)
    displacing = own.submit(*options, "--wrap=true")
    own.wait(displacing, "COMPLETED")
    assert output.read_text().count("saved") == 2
    assert "GraceTime=30 " in own.exec("scontrol", "show", "partition", "preemptible").stdout
    own.exec("scancel", job)
    own.wait_idle()


def test_mistakes_are_reported_in_one_line(
    own: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def message(*arguments: str, cluster: Cluster = own, env: dict[str, str] | None = None) -> str:
        done = cluster(*arguments, env=env)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("local-cluster: ") and done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("local-cluster: ")

    empty = tmp_path_factory.mktemp("e")  # short
    none = Cluster(tmp_path / "none")
    assert "is not installed" in (line := message("start", cluster=none, env={"PATH": str(empty)}))
    assert line.endswith("sudo apt-get install --no-install-recommends slurmctld slurmd slurm-client munge\n")
    for verb in ("stop", "exec"):
        assert "no cluster is running" in message(verb, cluster=none)
    assert "sockets in it allow" in message("start", cluster=Cluster(tmp_path / ("x" * 60)))
    (empty / "file").touch()
    assert "neither empty nor a cluster's" in message("start", cluster=Cluster(empty))
    assert "running" in message("start")
    assert f"there are {', '.join(own.nodes)}" in message("crash", "n9")
    assert "is up" in message("boot", own.nodes[0])
    assert "--nodes" in message("start", "--nodes=0", cluster=none)


def test_files_of_a_dead_cluster_are_no_obstacle(tmp_path_factory: pytest.TempPathFactory) -> None:
    left = Cluster(tmp_path_factory.mktemp("left"))
    (left.folder / "run").mkdir()
    (left.folder / "cluster.json").write_text("{}")
    with subprocess.Popen(["sleep", "60"]) as other:  # a process that has their numbers now
        for name in ("login.host", "n1.host", "slurmctld.pid"):
            (left.folder / "run" / name).write_text(str(other.pid))
        try:
            assert left.start(nodes=1).exec("srun", sys.executable, "-c", "print(6 * 7)").stdout == "42\n"
        finally:
            left.stop()
            assert other.poll() is None
            other.kill()
