"""Which nodes of an allocation are bad, and why: judges what the ranks of sft.cluster.preflight have left behind."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.runs.failure import FOLLOWING

Report = Mapping[str, Any]  # what one rank has measured, and how far it came

# In this order. Up to "write speed" a rank is on its own; from "connecting" on one that fails holds up all others.
STAGES = ("start", "node", "shared folder", "write speed", "connecting", "meeting", "clock", "locks", "all-reduce")
ALONE = STAGES[: STAGES.index("connecting")]
DONE = "done"


@dataclass(frozen=True)
class Limits:
    """What a node must keep to; each can be set with --limit NAME=VALUE."""

    runs_gb: float = 100  # free for runs: a checkpoint of 7 B parameters with AdamW's states has 84 GB
    tmp_gb: float = 5  # free in /tmp, for compiled kernels
    shm_gb: float = 1  # size of /dev/shm, through which NCCL and data workers pass tensors: Docker's 64 MB won't do
    write_mb_s: float = (
        50  # to the folder of the runs, all nodes at once: a checkpoint of 84 GB on 4 nodes in 7 minutes
    )
    shared_s: float = 30  # until a node sees a file that the first one has written
    clock_s: float = 1  # offset to the first node's clock: logs and file times are compared between nodes
    slow: float = 0.7  # share of the median node's bandwidth between its own GPUs
    gpu_celsius: float = 85  # a GPU that is this hot before the work begins isn't cooled


@dataclass
class Verdict:
    """`faults` by node; `troubles` are of no single node; `notes` don't matter for the outcome."""

    faults: dict[str, list[str]]
    troubles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def bad(self) -> list[str]:
        return [node for node, faults in self.faults.items() if faults]

    def line(self) -> str:
        """The last word, with what to give sbatch."""
        if self.bad:
            return f"bad nodes: --exclude={','.join(self.bad)}"
        return "no single node is to blame" if self.troubles else f"all {len(self.faults)} nodes are good"


def judge(
    reports: Sequence[Report], nodes: Sequence[str], ranks_a_node: int, limits: Limits, lost: Sequence[str] = ()
) -> Verdict:
    """What is wrong with an allocation.

    Args:
        reports: of all ranks that left one.
        nodes: of the allocation, the first one's first.
        lost: those of them that Slurm has down or drained by now.
    """
    verdict = Verdict({node: [] for node in nodes})
    by_node = {node: [each for each in reports if each["node"] == node] for node in nodes}
    leaders = {node: each for node in nodes for each in by_node[node] if each["local_rank"] == 0}
    absent = [node for node in nodes if len(by_node[node]) < ranks_a_node]
    for node in lost:
        verdict.faults[node].append("Slurm has it down or drained")
    for node in absent:
        num = len(by_node[node])
        verdict.faults[node].append(
            f"{ranks_a_node - num} of {ranks_a_node} ranks gave no answer"
            if num
            else "no answer: it starts no tasks, hangs, or doesn't see the folder"
        )
    # With a lost node srun ends all tasks: what they had not done by then says nothing of them.
    _stopped(verdict, [each for each in reports if each.get("error") or not lost], bool(absent or lost))
    for node, leader in leaders.items():
        verdict.faults[node] += _gpu_faults(leader, limits) + _beyond(leader, limits)
        if "shared_s" in leader and leader["shared_s"] is None and by_node[nodes[0]]:
            verdict.faults[node].append(f"no file of {nodes[0]} seen in the shared folder")
    _versions(verdict, leaders)
    _slow(verdict, leaders, limits)
    _locks(verdict, leaders)
    return verdict


def _stopped(verdict: Verdict, reports: Sequence[Report], absent: bool) -> None:
    """Blames the ranks that others waited for, not those that waited."""
    stopped = [each for each in reports if each["stage"] != DONE]
    for each in stopped:
        if each["stage"] in ALONE:
            _add(verdict.faults[each["node"]], _told(each))
    if not stopped or absent or any(each["stage"] in ALONE for each in stopped):
        if stopped or absent:
            verdict.notes.append("what takes all nodes was left out: test the others once more without the bad ones")
        return
    first = min((each["stage"] for each in stopped), key=STAGES.index)
    held = [each for each in stopped if each["stage"] == first]
    suspects = [each for each in held if each.get("error") and not FOLLOWING.search(each["error"])] or held
    names = list(dict.fromkeys(each["node"] for each in suspects))
    others = list(verdict.faults)[1:]
    if first == "connecting" and names == others and len(others) > 1:
        verdict.faults[next(iter(verdict.faults))].append("no other node can connect to it")
    elif len(names) < len(verdict.faults):
        for each in suspects:
            _add(verdict.faults[each["node"]], _told(each))
    else:
        verdict.troubles.append(f"on every node: {_told(suspects[0])}")


def _told(report: Report) -> str:
    return f"{report['stage']}: {report.get('error') or 'did not end in time'}"


def _add(faults: list[str], fault: str) -> None:
    """Once, whatever the number of ranks that say it."""
    if fault not in faults:
        faults.append(fault)


def _gpu_faults(leader: Report, limits: Limits) -> list[str]:
    if "gpus" not in leader:
        return []
    gpus, faults = leader["gpus"], []
    if gpus["visible"] != gpus["allocated"]:
        faults.append(f"{gpus['visible']} of {gpus['allocated']} GPUs are visible")
    for each in gpus["health"]:
        told = [*each["faults"]]
        if (each["celsius"] or 0) >= limits.gpu_celsius:
            told.append(f"{each['celsius']:.0f} °C")
        faults += [f"GPU {each['index']}: {fault}" for fault in told]
    return faults


def _beyond(leader: Report, limits: Limits) -> list[str]:
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


def _versions(verdict: Verdict, leaders: Mapping[str, Report]) -> None:
    """What most nodes have is right; between equal numbers, what the first of them has."""
    known = {node: leader["versions"] for node, leader in leaders.items() if "versions" in leader}
    for name in dict.fromkeys(name for versions in known.values() for name in versions):
        values = {node: versions.get(name) for node, versions in known.items()}
        counts = Counter(values.values()).most_common()
        right = counts[0][0]  # among equals the one met first
        for node, value in values.items():
            if value != right:
                verdict.faults[node].append(f"{name} is {value}, not {right}")
        if len(counts) > 1 and counts[0][1] == counts[1][1]:
            verdict.notes.append(f"{name}: {right} and {counts[1][0]} are on as many nodes; the first node's is kept")


def _slow(verdict: Verdict, leaders: Mapping[str, Report], limits: Limits) -> None:
    speeds = {node: each["inside_gb_s"] for node, each in leaders.items() if each.get("inside_gb_s")}
    if len(speeds) < 2:
        return
    median = statistics.median_high(speeds.values())
    for node, speed in speeds.items():
        if speed < limits.slow * median:
            verdict.faults[node].append(f"{speed:.3g} GB/s between its GPUs, {median:.3g} elsewhere")


def _locks(verdict: Verdict, leaders: Mapping[str, Report]) -> None:
    for kind in ("flock", "fcntl"):
        failing = [node for node, leader in leaders.items() if leader.get(kind) is False]
        if failing:
            verdict.notes.append(f"{kind} excludes nobody on {', '.join(failing)}: trust no lock in the runs' folder")
