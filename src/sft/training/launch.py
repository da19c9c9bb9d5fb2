"""Who started this process, and as which of how many ranks: torchrun, srun, another launcher, or nobody.

Lightning would go by the name of the Slurm job, and by variables that every shell of an allocation inherits. This is
known before torch is imported.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sft.errors import UserError

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment

# What a launcher gives each rank; Lightning, DeepSpeed and torch read them.
RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", *RANK)
NUM_OF_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")


@dataclass(frozen=True)
class Launch:
    """A rank of a launcher; without one, a process that starts the other ranks of its node itself."""

    by: str = ""  # the launcher; "": nobody
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    num_nodes: int | None = None  # None: the launcher doesn't say
    variables: dict[str, str] = field(default_factory=dict)  # by which the ranks meet

    def check(self, num_devices: int, num_nodes: int) -> None:
        """`UserError` unless the ranks that were started are those that the settings mean."""
        meant = num_devices * num_nodes
        if not self.by:
            if num_nodes > 1:
                raise UserError(
                    f"trainer.num_nodes={num_nodes} means {meant} ranks, and nobody started them: use sft submit, srun "
                    f"--nodes={num_nodes} --ntasks-per-node={num_devices} sft train, or on each node torchrun "
                    f"--nnodes={num_nodes} --nproc-per-node={num_devices} --rdzv-backend=c10d "
                    "--rdzv-endpoint=FIRST_NODE:29500 -m sft train"
                )
            return
        ranks = f"{_counted(meant, 'rank')} on {_counted(num_nodes, 'node')}"
        asked = f"trainer.devices={num_devices} and trainer.num_nodes={num_nodes} mean {ranks}"
        if self.world_size != meant or self.num_nodes not in (None, num_nodes):
            nodes = self.num_nodes or 1
            raise UserError(
                f"{self.by} started {_counted(self.world_size, 'rank')}"
                + (f" on {_counted(nodes, 'node')}" if self.num_nodes else "")
                + f", and {asked}: set trainer.devices={self.world_size // nodes} trainer.num_nodes={nodes}"
                + (" and a strategy for several devices" if meant == 1 else "")
                + f", or start {ranks}"
            )
        if self.local_rank >= num_devices:
            raise UserError(
                f"{self.by} set LOCAL_RANK={self.local_rank}, and {asked}, so that it is less than {num_devices}: set "
                "trainer.devices to the number of ranks on a node"
            )

    def enter(self) -> "ClusterEnvironment":
        """Makes this launch what libraries read in `os.environ`; Lightning's object for it."""
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = self.rank  # type: ignore[attr-defined]  # on import it took any rank that was set
        if self.by:
            os.environ |= self.variables
            return TorchElasticEnvironment()  # reads just these
        for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        return LightningEnvironment()


def find(environment: Mapping[str, str]) -> Launch:
    """The launch that the environment of a process shows; `UserError` for one that is not supported or not whole."""

    def number(name: str, default: int = 0) -> int:
        value = environment.get(name, str(default))
        if not value.isdecimal():
            raise UserError(f"{name}={value} in the environment is not a number: unset it")
        return int(value)

    def rank(by: str, num_nodes: int | None, **variables: str) -> Launch:
        given = {name: environment[name] for name in RANK if name in environment} | variables
        return Launch(by, int(given["WORLD_SIZE"]), int(given["RANK"]), int(given["LOCAL_RANK"]), num_nodes, given)

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        number(name)
    if environment.keys() >= set(TORCHRUN):
        if number("LOCAL_WORLD_SIZE") * number("GROUP_WORLD_SIZE") != number("WORLD_SIZE"):
            raise UserError(
                f"torchrun started {number('WORLD_SIZE')} ranks on {number('GROUP_WORLD_SIZE')} nodes, "
                f"{number('LOCAL_WORLD_SIZE')} on this one: set --nproc-per-node to the same number on each"
            )
        return rank("torchrun", number("GROUP_WORLD_SIZE"))
    # Set in a step of srun only; in a batch script and in the shell of salloc there is SLURM_NTASKS.
    num_tasks = number("SLURM_STEP_NUM_TASKS", 1)
    world_size = number("WORLD_SIZE", 1)
    missing = [name for name in RANK if name not in environment]
    if missing == ["RANK"] and environment.get("NODE_RANK") == "0":  # Lightning's own children
        missing, environment = [], {**environment, "RANK": environment["LOCAL_RANK"]}
    if not missing and world_size > num_tasks:  # in a step, too: a launcher in each task
        per_node = number("LOCAL_WORLD_SIZE") or number("LOCAL_SIZE")
        return rank("a launcher", world_size // per_node if per_node else None)
    for name in NUM_OF_MPI:
        if number(name, 1) not in (1, num_tasks):  # srun sets PMI_SIZE, too
            raise UserError(
                f"mpirun started {number(name)} processes ({name}), and none of them knows where the ranks meet: use "
                "srun or torchrun instead"
            )
    if num_tasks > 1:
        return rank("srun", number("SLURM_STEP_NUM_NODES"), **_of_step(environment))
    if world_size > 1 or number("RANK") or number("LOCAL_RANK"):
        given = [name for name in RANK[:3] if name in environment]
        raise UserError(
            f"the environment has {', '.join(f'{name}={environment[name]}' for name in given)}, as a launcher sets for "
            + (f"a rank, without {', '.join(missing)}" if missing else "a rank, which can't be")
            + f": unset {' '.join(given)}, or start the ranks with torchrun or srun"
        )
    return Launch()


def _of_step(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of a rank that srun started."""
    num_tasks, nodes = environment["SLURM_STEP_NUM_TASKS"], environment["SLURM_STEP_NODELIST"]
    spread = environment["SLURM_STEP_TASKS_PER_NODE"]  # 2(x3) or 2(x2),1
    if "," in spread:
        raise UserError(f"srun started {num_tasks} ranks on {nodes}, {spread} on a node: set --ntasks-per-node")
    one_node = environment["SLURM_STEP_NUM_NODES"] == "1"
    first = "127.0.0.1" if one_node else re.sub(r"\[(\w+)[^]]*\]", r"\1", nodes).split(",")[0]
    # Differs between the steps of a job and between jobs with numbers that are near; train.sbatch takes 20000 to 29999.
    port = 10000 + (int(environment["SLURM_JOB_ID"]) * 101 + int(environment["SLURM_STEP_ID"])) % 10000
    return {
        "WORLD_SIZE": num_tasks,
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "GROUP_RANK": environment["SLURM_NODEID"],
        "MASTER_ADDR": environment.get("MASTER_ADDR", first),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
    }


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
