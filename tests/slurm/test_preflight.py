"""The check of an allocation's nodes: every fault names its node, also when it is planted in a real cluster."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster import Cluster
from sft.cluster.preflight import gpus
from sft.cluster.preflight.judge import Judgement, Limits, judge

NODES = ["n1", "n2", "n3"]
# index, driver, temperature, uncorrected errors, pages to retire, rows to remap, rows that can't be, heat, power
GOOD_GPU = "0, 570.86.15, 34, 0, [N/A], No, No, Not Active, Not Active\n"


def rank(node: str, local_rank: int = 0, **changes: Any) -> dict[str, Any]:
    """The report of one of two ranks of a good node."""
    leading = {
        "gpus": {"allocated": 2, "visible": 2, "health": gpus.parse(GOOD_GPU)},
        "versions": {"sft": "c0ffee", "torch": "2.9.1", "driver": "570.86.15"},
        "runs_gb": 900.0,
        "tmp_gb": 50.0,
        "shm_gb": 64.0,
        "shared_s": 0.2,
        "write_mb_s": 800.0,
        "clock_s": -0.002,
        "inside_gb_s": 350.0,
    }
    number = 2 * NODES.index(node) + local_rank
    report = {"node": node, "rank": number, "local_rank": local_rank, "stage": "done"}
    return report | ({} if local_rank else leading) | changes


def judgement(*changed: dict[str, Any], without: tuple[int, ...] = ()) -> Judgement:
    """Of three good nodes of two ranks, but for the ranks that changed or are absent."""
    reports = {report["rank"]: report for node in NODES for report in (rank(node), rank(node, 1))}
    reports |= {report["rank"]: report for report in changed}
    return judge([report for number, report in reports.items() if number not in without], NODES, 2, Limits())


def test_good_nodes() -> None:
    good = judgement()
    assert good.line() == "all 3 nodes are good" and not good.troubles and not good.notes


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"gpus": {"allocated": 2, "visible": 1, "health": []}}, "1 of 2 GPUs are visible"),
        ({"versions": {"sft": "c0ffee", "torch": "2.8.0", "driver": "570.86.15"}}, "torch is 2.8.0, not 2.9.1"),
        ({"versions": {"sft": "c0ffee", "torch": "2.9.1"}}, "driver is None, not 570.86.15"),
        ({"runs_gb": 12.5}, "free for runs: 12.5 GB, not 100"),
        ({"tmp_gb": 1.0}, "free in /tmp: 1 GB, not 5"),
        ({"shm_gb": 0.067}, "/dev/shm: 0.067 GB, not 1"),
        ({"write_mb_s": 3.0}, "written to the shared folder: 3 MB/s, not 50"),
        ({"shared_s": 45.0}, "a file of another node seen after 45 s, more than 30"),
        ({"shared_s": None}, "no file of n1 seen in the shared folder"),
        ({"clock_s": -2.5}, "clock off by -2.5 s, more than 1"),
        ({"inside_gb_s": 90.0}, "90 GB/s between its GPUs, 350 elsewhere"),
        (
            {"stage": "node", "error": "RuntimeError: nvidia-smi ended with exit code 9"},
            "node: RuntimeError: nvidia-smi",
        ),
        (
            {"stage": "all-reduce", "error": "AcceleratorError: CUDA error: uncorrectable ECC"},
            "all-reduce: Accelerator",
        ),
        ({"stage": "clock"}, "clock: did not end in time"),
    ],
)
def test_a_fault_names_its_node(changes: dict[str, Any], fault: str) -> None:
    judged = judgement(rank("n2", **changes))
    assert judged.line() == "bad nodes: --exclude=n2"
    (reported,) = judged.faults["n2"]
    assert reported.startswith(fault)


def test_absent_ranks_are_blamed_and_not_those_that_waited() -> None:
    waiting = [rank(node, at, stage="meeting", error="waited in vain") for node in NODES for at in (0, 1)]
    gone = judgement(*waiting, without=(4, 5))
    assert gone.bad == ["n3"] and gone.faults["n3"][0].startswith("no answer") and gone.notes
    assert judgement(*waiting, without=(3,)).faults["n2"] == ["1 of 2 ranks gave no answer"]
    # All came, and one hangs in an earlier stage than those that wait for it.
    behind = rank("n2", 1, stage="connecting", error="n1:20001 can't be reached")
    assert judgement(*waiting, behind).faults == {"n1": [], "n2": ["connecting: n1:20001 can't be reached"], "n3": []}
    # What the others say when one fails is no fault of theirs.
    failing = [
        rank(node, stage="all-reduce", error="DistBackendError: NCCL error: remote process exited") for node in NODES
    ]
    failing[2] = rank("n3", stage="all-reduce", error="AcceleratorError: CUDA error: unspecified launch failure")
    assert judgement(*failing).bad == ["n3"]


def test_a_node_lost_during_the_check_is_blamed() -> None:
    hanging = [rank(node, at, stage="all-reduce") for node in NODES for at in (0, 1)]
    lost = judge(hanging, NODES, 2, Limits(), lost=["n2"])
    assert lost.bad == ["n2"] and not lost.troubles
    writing = [rank(node, stage="write speed") for node in NODES]
    assert judge(writing, NODES, 1, Limits(), lost=["n2"]).bad == ["n2"]


def test_a_fault_of_all_nodes_is_blamed_on_none() -> None:
    hanging = judgement(*(rank(node, at, stage="all-reduce") for node in NODES for at in (0, 1)))
    assert hanging.troubles == ["on every node: all-reduce: did not end in time"]
    assert hanging.line() == "no single node is to blame"
    unreached = [
        rank(node, at, stage="connecting", error="n1:20001 can't be reached") for node in NODES[1:] for at in (0, 1)
    ]
    assert judgement(*unreached, rank("n1", stage="meeting"), rank("n1", 1, stage="meeting")).bad == ["n1"]


def test_in_a_tie_the_first_nodes_version_is_right_with_a_note() -> None:
    reports = [rank("n1", versions={"torch": "2.8.0"}), rank("n2", versions={"torch": "2.9.1"})]
    tie = judge(reports, NODES[:2], 1, Limits())
    assert tie.faults["n2"] == ["torch is 2.9.1, not 2.8.0"] and not tie.faults["n1"]
    assert tie.notes == ["torch: 2.8.0 and 2.9.1 are on as many nodes; the first node's is kept"]


def test_health_of_gpus() -> None:
    csv = (
        GOOD_GPU
        + "1, 570.86.15, 88, 3, [N/A], Yes, No, Active, Not Active\n"
        + "2, 570.86.15, [N/A], [N/A], Yes, [N/A], [N/A], [Not Supported], Active\n"
    )
    good, hot, old = gpus.parse(csv)
    assert good == {"index": 0, "driver": "570.86.15", "celsius": 34.0, "faults": []}
    assert hot["faults"] == [
        "uncorrected memory errors (3)",
        "a memory row waits to be remapped, which a reset does (Yes)",
        "slowed down by heat (Active)",
    ]
    assert old["celsius"] is None and len(old["faults"]) == 2
    node = rank("n2", gpus={"allocated": 2, "visible": 2, "health": [hot]})
    assert judgement(node).faults["n2"] == [*(f"GPU 1: {fault}" for fault in hot["faults"]), "GPU 1: 88 °C"]


@pytest.mark.xdist_group("slurm too")
def test_planted_faults_are_found_on_a_cluster(cluster: Cluster, tmp_path: Path) -> None:
    slurm = Path(__file__).parents[2] / "slurm"
    (tmp_path / "slurm" / "logs").mkdir(parents=True)
    shutil.copy(slurm / "preflight.sbatch", tmp_path / "slurm")
    _, second, third = cluster.nodes
    # The second node has another version of a library; the third never gets to the check.
    older = tmp_path / "older" / "transformers-0.0.1.dist-info"
    older.mkdir(parents=True)
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 0.0.1\n")
    container = tmp_path / "container"
    container.write_text(
        f"#!/bin/sh\n[ $SLURMD_NODENAME = {second} ] && export PYTHONPATH={older.parent}:$PYTHONPATH\n"
        f'[ $SLURMD_NODENAME$HANGS = {third}yes ] && exec sleep 20\nexec "$@"\n'
    )
    container.chmod(0o755)
    site = (slurm / "site.sh").read_text().replace("container=()", f"container=({container})")
    (tmp_path / "slurm" / "site.sh").write_text(f"{site}\nPATH={Path(sys.executable).parent}:$PATH\n")

    def preflight(timeout: int, **environment: str) -> str:
        options = "--nodes=3 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=1 slurm/preflight.sbatch"
        checks = "--write-mb=8 --limit=runs_gb=0.1 --limit=tmp_gb=0.1 --limit=write_mb_s=0.1 --limit=shm_gb=0.01"
        command = [*options.split(), *checks.split(), f"--timeout={timeout}"]
        job = cluster.submit(*command, cwd=tmp_path, env=environment)
        cluster.wait(job, "FAILED", ExitCode="1:0")
        return (tmp_path / "slurm" / "logs" / f"preflight-{job}.out").read_text()

    report = preflight(timeout=150)
    assert "excludes nobody" not in report
    (seen,) = (tmp_path / "runs").glob(".preflight/*/rank-1.json")
    assert abs(json.loads(seen.read_text())["clock_s"]) < 1  # they share a clock
    assert "transformers is 0.0.1, not" in report
    assert "all-reduce of 16 MB over 3 ranks" in report
    assert report.splitlines()[-1] == f"bad nodes: --exclude={second}"

    report = preflight(timeout=45, HANGS="yes")  # of which the others wait a third for the missing node
    assert "no answer" in report
    assert report.splitlines()[-1] == f"bad nodes: --exclude={second},{third}"
