"""Whether a partition has the nodes that a job needs."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sft.cluster.sbatch import Job, count_gpus
from sft.cluster.slurm import ask
from sft.cluster.time_limit import clock, duration
from sft.errors import UserError


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike. `cpus` and `gpus` per node; times as sinfo prints them."""

    partition: str
    default: bool
    num: int
    cpus: int
    gpus: int
    max_time: str
    default_time: str
    partition_up: bool
    state: str

    @property
    def available(self) -> bool:
        return not self.state.startswith(("down", "drain", "fail", "unk", "maint", "power"))

    def fit(self, job: Job) -> bool:
        return self.cpus >= job.tasks * job.cpus and self.gpus >= job.gpus


def nodes() -> list[Nodes]:
    """All nodes that sinfo shows."""
    groups = []
    for line in ask("sinfo", "--noheader", "--all", "--exact", "--format=%P|%D|%c|%G|%l|%L|%a|%T").splitlines():
        name, num, cpus, gres, max_time, default_time, available, state = line.split("|")
        gpus = [re.sub(r"\(.*", "", item) for item in re.split(r",(?![^(]*\))", gres) if item.startswith("gpu")]
        groups.append(
            Nodes(
                partition=name.removesuffix("*"),
                default=name.endswith("*"),
                num=int(num),
                cpus=int(cpus),
                gpus=sum(map(count_gpus, gpus)),
                max_time=max_time,
                default_time=default_time,
                partition_up=available == "up",
                state=state,
            )
        )
    return groups


def check_resources(job: Job, groups: Sequence[Nodes]) -> list[str]:
    """Notes on what the job will wait for; `UserError` if none of its partitions can ever run it."""
    names = sorted({group.partition for group in groups})
    wanted = job.partitions or sorted({group.partition for group in groups if group.default})
    if not wanted:
        raise UserError(f"the cluster has no default partition: set --partition, one of {', '.join(names)}")
    problems, notes = [], []
    for name in wanted:
        if name not in names:
            raise UserError(f"there is no partition {name}: there are {', '.join(names)}")
        partition = [group for group in groups if group.partition == name]
        if problem := _problem(job, name, partition):
            problems.append(problem)
        elif note := _wait(job, name, partition):
            notes.append(note)
    if len(problems) == len(wanted):
        raise UserError(problems[0])
    return notes


def _problem(job: Job, name: str, partition: Sequence[Nodes]) -> str | None:
    """Why a partition never runs the job."""
    if sum(group.num for group in partition if group.fit(job)) < job.nodes:
        kinds: Counter[tuple[int, int]] = Counter()
        for group in partition:
            kinds[group.cpus, group.gpus] += group.num
        has = ", ".join(f"{num} with {cpus} CPUs and {gpus} GPUs" for (cpus, gpus), num in sorted(kinds.items()))
        return (
            f"the job needs {_num_nodes(job)} with {job.tasks * job.cpus} CPUs and {job.gpus} GPUs, and "
            f"partition {name} has {has}: set --nodes, --ntasks-per-node, --gpus-per-node, --cpus-per-task"
        )
    longest = duration(partition[0].max_time) if partition[0].max_time != "n/a" else math.inf
    if job.limit is not None and job.limit > longest and not job.qos:  # a QOS may allow more
        return (
            f"--time={clock(job.limit)} is more than partition {name} allows: set --time={clock(longest)} or less; "
            "at the time limit the job is requeued and resumes"
        )
    return None


def _wait(job: Job, name: str, partition: Sequence[Nodes]) -> str | None:
    """What the job will wait for there."""
    if not partition[0].partition_up:
        return f"partition {name} is down, so the job waits"
    num_available = sum(group.num for group in partition if group.fit(job) and group.available)
    if num_available < job.nodes:
        return f"{num_available} of the {_num_nodes(job)} that it needs are up in partition {name}, so the job waits"
    return None


def _num_nodes(job: Job) -> str:
    return "1 node" if job.nodes == 1 else f"{job.nodes} nodes"


def limit(job: Job, groups: Sequence[Nodes]) -> float:
    """The job's time limit in seconds: its own or the partition's."""
    if job.limit is not None:
        return job.limit
    first = next(
        group for group in groups if group.partition in job.partitions or (group.default and not job.partitions)
    )
    return duration(first.default_time if first.default_time != "n/a" else first.max_time)
