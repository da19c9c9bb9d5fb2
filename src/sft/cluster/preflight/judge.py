"""Which nodes of an allocation are bad, and why, by the reports of its ranks."""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.runs.failure import FOLLOWING

Report = Mapping[str, Any]  # the measurements of one rank, and the stage that it reached

# In this order. Up to "write speed" a rank is on its own; from "connecting" on a rank that fails holds up all others.
STAGES = ("start", "node", "shared folder", "write speed", "connecting", "meeting", "clock", "all-reduce")
ALONE = STAGES[: STAGES.index("connecting")]
DONE = "done"


@dataclass(frozen=True)
class Limits:
    """The limits that a node must keep; each can be set with --limit NAME=VALUE."""

    runs_gb: float = 100  # free for runs: a checkpoint of 7 B parameters with AdamW's states has 84 GB
    tmp_gb: float = 5  # free in /tmp, for compiled kernels
    shm_gb: float = 1  # size of /dev/shm, through which NCCL and data workers pass tensors; Docker's 64 MB is too small
    # To the folder of the runs, all nodes at once: a checkpoint of 84 GB on 4 nodes in 7 minutes.
    write_mb_s: float = 50
    shared_s: float = 30  # until a node sees a file that the first one has written
    clock_s: float = 1  # offset from the first node's clock: logs and file times are compared between nodes
    slow: float = 0.7  # share of the median node's bandwidth between its own GPUs
    gpu_celsius: float = 85  # a GPU that is this hot before the work begins isn't cooled


@dataclass
class Judgement:
    """`faults` by node; `troubles` that no single node explains; `notes` that don't matter for the outcome."""

    faults: dict[str, list[str]]
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[str]:
        return [node for node, faults in self.faults.items() if faults]

    def line(self) -> str:
        """The last line of the report, with the option for sbatch."""
        if self.bad:
            return f"bad nodes: --exclude={','.join(self.bad)}"
        return "no single node is to blame" if self.troubles else f"all {len(self.faults)} nodes are good"


def judge(
    reports: Sequence[Report], nodes: Sequence[str], ranks_per_node: int, limits: Limits, lost: Sequence[str] = ()
) -> Judgement:
    """Judges an allocation.

    Args:
        reports: of all ranks that left one.
        nodes: of the allocation, the first rank's first.
        lost: the nodes that Slurm has down or drained by now.
    """
    by_node = {node: [report for report in reports if report["node"] == node] for node in nodes}
    leaders = {node: report for node in nodes for report in by_node[node] if report["local_rank"] == 0}
    absent = [node for node in nodes if len(by_node[node]) < ranks_per_node]
    judgement = Judgement({node: [] for node in nodes})
    for node in lost:
        judgement.faults[node].append("Slurm has it down or drained")
    for node in absent:
        num = len(by_node[node])
        judgement.faults[node].append(
            f"{ranks_per_node - num} of {ranks_per_node} ranks gave no answer"
            if num
            else "no answer: it starts no tasks, hangs, or doesn't see the folder"
        )
    # When a node is lost, srun ends all tasks: a rank's unfinished stages then prove nothing.
    _judge_stopped(judgement, [report for report in reports if report.get("error") or not lost], bool(absent or lost))
    for node, leader in leaders.items():
        judgement.faults[node] += [*_gpu_faults(leader, limits), *_beyond(leader, limits)]
        if "shared_s" in leader and leader["shared_s"] is None and by_node[nodes[0]]:
            judgement.faults[node].append(f"no file of {nodes[0]} seen in the shared folder")
    _judge_versions(judgement, leaders)
    _judge_bandwidth(judgement, leaders, limits)
    return judgement


def _judge_stopped(judgement: Judgement, reports: Sequence[Report], absent: bool) -> None:
    """Blames the ranks that others waited for, not those that waited. `absent`: some ranks left no report."""
    stopped = [report for report in reports if report["stage"] != DONE]
    alone = [report for report in stopped if report["stage"] in ALONE]
    _blame(judgement, alone)
    if alone or absent:
        judgement.notes.append("stages that need all nodes were left out: test the others again without the bad ones")
        return
    if not stopped:
        return
    first = min((report["stage"] for report in stopped), key=STAGES.index)
    behind = [report for report in stopped if report["stage"] == first]
    suspects = [report for report in behind if report.get("error") and not FOLLOWING.search(report["error"])] or behind
    names = list(dict.fromkeys(report["node"] for report in suspects))
    first_node, *others = judgement.faults
    if first == "connecting" and names == others and len(others) > 1:
        judgement.faults[first_node].append("no other node can connect to it")
    elif len(names) < len(judgement.faults):
        _blame(judgement, suspects)
    else:
        judgement.troubles.append(f"on every node: {_stop_reason(suspects[0])}")


def _blame(judgement: Judgement, reports: Iterable[Report]) -> None:
    """Adds to each node why its ranks stopped, once however many ranks say it."""
    for report in reports:
        faults, reason = judgement.faults[report["node"]], _stop_reason(report)
        if reason not in faults:
            faults.append(reason)


def _stop_reason(report: Report) -> str:
    return f"{report['stage']}: {report.get('error') or 'did not end in time'}"


def _gpu_faults(leader: Report, limits: Limits) -> list[str]:
    if "gpus" not in leader:
        return []
    gpus, faults = leader["gpus"], []
    if gpus["visible"] != gpus["allocated"]:
        faults.append(f"{gpus['visible']} of {gpus['allocated']} GPUs are visible")
    for gpu in gpus["health"]:
        faults += [f"GPU {gpu['index']}: {fault}" for fault in gpu["faults"]]
        if (gpu["celsius"] or 0) >= limits.gpu_celsius:
            faults.append(f"GPU {gpu['index']}: {gpu['celsius']:.0f} °C")
    return faults


def _beyond(leader: Report, limits: Limits) -> list[str]:
    """The measurements that are beyond their limits."""
    faults = []
    for name, what, unit in (
        ("runs_gb", "free for runs", "GB"),
        ("tmp_gb", "free in /tmp", "GB"),
        ("shm_gb", "/dev/shm", "GB"),
        ("write_mb_s", "written to the shared folder", "MB/s"),
    ):
        least, value = getattr(limits, name), leader.get(name)
        if value is not None and value < least:
            faults.append(f"{what}: {value:.3g} {unit}, not {least:.3g}")
    for name, what in (("shared_s", "a file of another node seen after"), ("clock_s", "clock off by")):
        most, value = getattr(limits, name), leader.get(name)
        if value is not None and abs(value) > most:
            faults.append(f"{what} {value:.3g} s, more than {most:.3g}")
    return faults


def _judge_versions(judgement: Judgement, leaders: Mapping[str, Report]) -> None:
    """The version on most nodes is right; in a tie, that of the first node."""
    versions = {node: leader["versions"] for node, leader in leaders.items() if "versions" in leader}
    for name in dict.fromkeys(name for installed in versions.values() for name in installed):
        by_node = {node: installed.get(name) for node, installed in versions.items()}
        counts = Counter(by_node.values()).most_common()  # in a tie, the version met first is first
        right = counts[0][0]
        for node, version in by_node.items():
            if version != right:
                judgement.faults[node].append(f"{name} is {version}, not {right}")
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            judgement.notes.append(f"{name}: {right} and {counts[1][0]} are on as many nodes; the first node's is kept")


def _judge_bandwidth(judgement: Judgement, leaders: Mapping[str, Report], limits: Limits) -> None:
    speeds = {node: leader["inside_gb_s"] for node, leader in leaders.items() if leader.get("inside_gb_s")}
    if len(speeds) < 2:
        return
    median = statistics.median_high(speeds.values())
    for node, speed in speeds.items():
        if speed < limits.slow * median:
            judgement.faults[node].append(f"{speed:.3g} GB/s between its GPUs, {median:.3g} elsewhere")
