"""Whether a partition has the nodes that a job needs."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sft.cluster.sbatch import Job, count_gpus
from sft.cluster.slurm import ask
from sft.cluster.time_limit import clock, duration
from sft.errors import UserError


@dataclass(frozen=True)
class Nodes:
    """Nodes of a partition that are alike."""

    partition: str
    default: bool
    num: int
    cpus: int  # of each
    gpus: int  # of each
    max_time: str
    default_time: str
    up: bool  # the partition
    state: str

    @property
    def away(self) -> bool:
        return self.state.startswith(("down", "drain", "fail", "unk", "maint", "power"))


def nodes() -> list[Nodes]:
    """All that sinfo shows."""
    found = []
    for line in ask("sinfo", "--noheader", "--all", "--exact", "--format=%P|%D|%c|%G|%l|%L|%a|%T").splitlines():
        name, num, cpus, gres, max_time, default_time, available, state = line.split("|")
        gpus = [re.sub(r"\(.*", "", each) for each in re.split(r",(?![^(]*\))", gres) if each.startswith("gpu")]
        found.append(
            Nodes(
                name.removesuffix("*"),
                name.endswith("*"),
                int(num),
                int(cpus),
                sum(count_gpus(each) for each in gpus),
                max_time,
                default_time,
                available == "up",
                state,
            )
        )
    return found


def check_resources(job: Job, found: Sequence[Nodes]) -> list[str]:
    """What it will have to wait for; `UserError` where the partition will never run it."""
    known = sorted({each.partition for each in found})
    wanted = job.partitions or sorted({each.partition for each in found if each.default})
    if not wanted:
        raise UserError(f"the cluster has no default partition: set --partition, one of {', '.join(known)}")
    for name in wanted:
        if name not in known:
            raise UserError(f"there is no partition {name}: there are {', '.join(known)}")
    problems = {name: _problem(job, name, [each for each in found if each.partition == name]) for name in wanted}
    if all(problems.values()):
        raise UserError(str(next(iter(problems.values()))))
    return [
        note
        for name, problem in problems.items()
        if not problem and (note := _wait(job, name, [each for each in found if each.partition == name]))
    ]


def _fits(job: Job, node: Nodes) -> bool:
    return node.cpus >= job.tasks * job.cpus and node.gpus >= job.gpus


def _problem(job: Job, name: str, there: Sequence[Nodes]) -> str | None:
    """Why a partition never runs the job."""
    fitting = sum(each.num for each in there if _fits(job, each))
    if fitting < job.nodes:
        kinds: dict[tuple[int, int], int] = {}
        for each in there:
            kinds[each.cpus, each.gpus] = kinds.get((each.cpus, each.gpus), 0) + each.num
        has = ", ".join(f"{num} with {cpus} CPUs and {gpus} GPUs" for (cpus, gpus), num in sorted(kinds.items()))
        return (
            f"the job needs {_several(job.nodes, 'node')} with {job.tasks * job.cpus} CPUs and {job.gpus} GPUs, and "
            f"partition {name} has {has}: set --nodes, --ntasks-per-node, --gpus-per-node, --cpus-per-task"
        )
    longest = duration(there[0].max_time) if there[0].max_time != "n/a" else math.inf
    if job.limit is not None and job.limit > longest and not job.qos:  # a QOS may allow more
        return (
            f"--time={clock(job.limit)} is more than partition {name} allows: set --time={clock(longest)} or less; "
            "when it is over, the job is requeued and goes on"
        )
    return None


def _wait(job: Job, name: str, there: Sequence[Nodes]) -> str | None:
    if not there[0].up:
        return f"partition {name} is down, so the job waits"
    up = sum(each.num for each in there if _fits(job, each) and not each.away)
    if up < job.nodes:
        return f"{up} of the {_several(job.nodes, 'node')} that it needs are up in partition {name}, so the job waits"
    return None


def _several(num: int, what: str) -> str:
    return f"{num} {what}" + ("s" if num != 1 else "")


def limit(job: Job, found: Sequence[Nodes]) -> float:
    """The job's time limit in seconds: its own or the partition's."""
    if job.limit is not None:
        return job.limit
    there = next(each for each in found if each.partition in job.partitions or (each.default and not job.partitions))
    return duration(there.default_time if there.default_time != "n/a" else there.max_time)
