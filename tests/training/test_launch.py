"""However ranks are started, the run has as many as its settings mean, or says why not before anything is loaded."""

import os
import subprocess
import sys
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from runfiles import final_files, rows
from running import Sft
from sft.config import CONF
from sft.errors import UserError
from sft.training.checkpointing import check_ranks
from sft.training.datamodule import SFTDataModule
from sft.training.launch import Launch, find
from sft.training.settings import check, settle
from warm import python


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in text.split())


# As Slurm 22.05 sets them: an allocation of 4 tasks on 2 nodes, in the batch script, in a shell of salloc, in steps.
JOB = variables("SLURM_JOB_ID=71 SLURM_NTASKS=4 SLURM_NPROCS=4 SLURM_JOB_NODELIST=n[1-2] SLURM_TASKS_PER_NODE=2(x2)")
BATCH = JOB | variables("SLURMD_NODENAME=n1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NAME=train")
SALLOC = JOB | {"SLURM_JOB_NAME": "interactive"}
STEP = BATCH | variables(
    "SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_NODES=2 SLURM_STEP_NUM_TASKS=4 "
    "SLURM_STEP_TASKS_PER_NODE=2(x2) SLURMD_NODENAME=n2 SLURM_PROCID=3 SLURM_LOCALID=1 SLURM_NODEID=1"
)
ON_ONE_NODE = variables("SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n1 SLURMD_NODENAME=n1 SLURM_NODEID=0")
STEP_OF_TWO = STEP | ON_ONE_NODE | variables(
    "SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_PROCID=1 SLURM_LOCALID=1"
)  # fmt: skip
STEP_OF_ONE = STEP | ON_ONE_NODE | variables(
    "SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1 SLURM_STEP_TASKS_PER_NODE=1 SLURM_PROCID=0 SLURM_LOCALID=0"
)  # fmt: skip
# srun --preserve-env, with which some sites start the shell of salloc
SHELL_OF_SALLOC = STEP_OF_ONE | variables("SLURM_NTASKS=4 SLURM_JOB_NAME=interactive")
ADDRESS = variables("MASTER_ADDR=n1 MASTER_PORT=29500")
TORCHRUN = ADDRESS | variables(
    "TORCHELASTIC_RUN_ID=none RANK=1 LOCAL_RANK=1 WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 GROUP_RANK=0 GROUP_WORLD_SIZE=1"
)
TORCHRUN_ON_TWO_NODES = TORCHRUN | variables("RANK=3 WORLD_SIZE=4 GROUP_RANK=1 GROUP_WORLD_SIZE=2")
GENERIC = ADDRESS | variables("RANK=1 LOCAL_RANK=1 WORLD_SIZE=2")
OF_LIGHTNING = ADDRESS | variables("NODE_RANK=0 LOCAL_RANK=1 WORLD_SIZE=2")
MPIRUN = variables("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_LOCAL_RANK=1")


@pytest.mark.parametrize(
    ("environment", "by", "place"),
    [
        ({}, "", (1, 0, 0)),
        (BATCH, "", (1, 0, 0)),
        (SALLOC, "", (1, 0, 0)),
        (SHELL_OF_SALLOC, "", (1, 0, 0)),
        (STEP_OF_ONE, "", (1, 0, 0)),
        (STEP_OF_ONE | {"SLURM_JOB_NAME": "interactive"}, "", (1, 0, 0)),
        (STEP_OF_ONE | {"SLURM_JOB_NAME": "bash"}, "", (1, 0, 0)),
        (STEP_OF_TWO, "srun", (2, 1, 1)),
        (STEP_OF_TWO | {"SLURM_JOB_NAME": "interactive"}, "srun", (2, 1, 1)),
        (STEP_OF_TWO | variables("PMI_RANK=1 PMI_SIZE=2"), "srun", (2, 1, 1)),  # srun --mpi=pmi2
        (STEP_OF_TWO | variables("RANK=0 LOCAL_RANK=0"), "srun", (2, 1, 1)),  # left over in the shell
        (STEP_OF_TWO | GENERIC | {"RANK": "0"}, "srun", (2, 1, 1)),
        (STEP, "srun", (4, 3, 1)),
        (TORCHRUN, "torchrun", (2, 1, 1)),
        (BATCH | TORCHRUN, "torchrun", (2, 1, 1)),
        (STEP_OF_ONE | TORCHRUN, "torchrun", (2, 1, 1)),
        (STEP | TORCHRUN_ON_TWO_NODES, "torchrun", (4, 3, 1)),
        (GENERIC, "a launcher", (2, 1, 1)),
        (STEP_OF_ONE | GENERIC, "a launcher", (2, 1, 1)),
        (STEP_OF_TWO | GENERIC | variables("RANK=3 WORLD_SIZE=4"), "a launcher", (4, 3, 1)),  # started in each task
        (MPIRUN | GENERIC, "a launcher", (2, 1, 1)),
        (OF_LIGHTNING, "a launcher", (2, 1, 1)),
        (STEP_OF_ONE | OF_LIGHTNING, "a launcher", (2, 1, 1)),
        (variables("RANK=0 LOCAL_RANK=0 WORLD_SIZE=1"), "", (1, 0, 0)),
        (variables("OMPI_COMM_WORLD_SIZE=1"), "", (1, 0, 0)),
        (variables("SLURM_PROCID=3"), "", (1, 0, 0)),
    ],
)
def test_who_started_this_process(environment: dict[str, str], by: str, place: tuple[int, int, int]) -> None:
    launch = find(environment)
    assert (launch.by, (launch.world_size, launch.rank, launch.local_rank)) == (by, place)
    if by:
        assert launch.variables.keys() >= {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        assert [int(launch.variables[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")] == list(place)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (MPIRUN, r"mpirun started 2 processes \(OMPI_COMM_WORLD_SIZE\).* use srun or torchrun"),
        (BATCH | MPIRUN, "mpirun started 2 processes"),
        (STEP | MPIRUN, "mpirun started 2 processes"),  # by a step with a daemon on each node
        (variables("PMI_RANK=0 PMI_SIZE=8"), r"mpirun started 8 processes \(PMI_SIZE\)"),
        ({"RANK": "1"}, "RANK=1, .* without LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT: unset RANK, or start"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2, .* without RANK, WORLD_SIZE"),
        (ADDRESS | variables("RANK=0 WORLD_SIZE=2"), "RANK=0, WORLD_SIZE=2, .* without LOCAL_RANK: unset RANK WORLD_S"),
        (GENERIC | {"WORLD_SIZE": "1"}, "RANK=1, LOCAL_RANK=1, WORLD_SIZE=1, .* which can't be"),
        ({"RANK": "first"}, "RANK=first in the environment is not a number"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, r"4 ranks on n\[1-2\], 3,1 on a node: set --ntasks-per-node"),
        (TORCHRUN_ON_TWO_NODES | {"WORLD_SIZE": "3"}, "torchrun started 3 ranks on 2 nodes, 2 on this one"),
    ],
)  # fmt: skip
def test_a_launch_that_is_not_whole_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find(environment)


def settings(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=["trainer=cpu", *overrides])


def settled(environment: dict[str, str], *overrides: str) -> tuple[object, object, int]:
    """Devices, nodes and number of ranks of `sft train` with these settings in this environment."""
    config = settings(*overrides)
    settle(config, find(environment))
    return config.trainer.devices, config.trainer.num_nodes, check(config)[0]


AUTO = ("trainer.devices=auto", "trainer.num_nodes=auto", "strategy=ddp")


@pytest.mark.parametrize(
    ("environment", "overrides", "expected"),
    [
        ({}, ["trainer.devices=2", "strategy=ddp"], (2, 1, 2)),
        ({}, ["trainer.devices=[1,3]", "strategy=ddp"], ([1, 3], 1, 2)),
        ({}, AUTO, (1, 1, 1)),
        (SALLOC, ["trainer.devices=2", "strategy=ddp"], (2, 1, 2)),
        (STEP_OF_ONE, ["trainer.devices=2", "strategy=ddp"], (2, 1, 2)),
        (STEP_OF_ONE, AUTO, (1, 1, 1)),
        (STEP_OF_TWO, ["trainer.devices=2", "strategy=ddp"], (2, 1, 2)),
        (STEP, ["trainer.devices=2", "trainer.num_nodes=2", "strategy=ddp"], (2, 2, 4)),
        (STEP, AUTO, (2, 2, 4)),
        (STEP, ["trainer.devices=-1", "trainer.num_nodes=2", "strategy=ddp"], (2, 2, 4)),
        (STEP, ["trainer.devices=2", "trainer.num_nodes=auto", "strategy=ddp"], (2, 2, 4)),
        (TORCHRUN, AUTO, (2, 1, 2)),
        (TORCHRUN_ON_TWO_NODES, AUTO, (2, 2, 4)),
        (GENERIC, AUTO, (2, 1, 2)),
        (GENERIC | variables("WORLD_SIZE=4 LOCAL_SIZE=2"), AUTO, (2, 2, 4)),
        (GENERIC | {"WORLD_SIZE": "4"}, ["trainer.devices=2", "trainer.num_nodes=auto", "strategy=ddp"], (2, 2, 4)),
        (OF_LIGHTNING, ["trainer.devices=2", "strategy=ddp"], (2, 1, 2)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_ranks_are_those_that_the_settings_mean(
    environment: dict[str, str], overrides: list[str], expected: tuple[object, object, int]
) -> None:
    assert settled(environment, *overrides) == expected


@pytest.mark.parametrize(
    ("environment", "overrides", "message"),
    [
        (
            STEP_OF_TWO,
            [],
            "srun started 2 ranks on 1 node, and trainer.devices=1 and trainer.num_nodes=1 mean 1 rank on 1 node: set "
            "trainer.devices=2 trainer.num_nodes=1 and a strategy for several devices, or start 1 rank on 1 node",
        ),
        (
            TORCHRUN,
            ["trainer.devices=4", "strategy=ddp"],
            "torchrun started 2 ranks on 1 node, and trainer.devices=4 and trainer.num_nodes=1 mean 4 ranks on 1 node: "
            "set trainer.devices=2 trainer.num_nodes=1, or start 4 ranks on 1 node",
        ),
        (
            TORCHRUN_ON_TWO_NODES,
            ["trainer.devices=4", "strategy=ddp"],
            "torchrun started 4 ranks on 2 nodes, and trainer.devices=4 and trainer.num_nodes=1 mean 4 ranks on 1 "
            "node: set trainer.devices=2 trainer.num_nodes=2, or start 4 ranks on 1 node",
        ),
        (
            GENERIC,
            ["trainer.devices=1", "trainer.num_nodes=2", "strategy=ddp"],
            "a launcher set LOCAL_RANK=1, and trainer.devices=1 and trainer.num_nodes=2 mean 2 ranks on 2 nodes, so "
            "that it is less than 1: set trainer.devices to the number of ranks on a node",
        ),
        (
            STEP_OF_ONE,
            ["trainer.devices=8", "trainer.num_nodes=2", "strategy=ddp"],
            "trainer.num_nodes=2 means 16 ranks, and nobody started them: use sft submit, srun --nodes=2 "
            "--ntasks-per-node=8 sft train, or on each node torchrun --nnodes=2 --nproc-per-node=8 "
            "--rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 -m sft train",
        ),
        (
            TORCHRUN,
            ["trainer.devices=auto"],
            "strategy=single is for one device, and the trainer has 2: set strategy=ddp",
        ),
    ],
)  # fmt: skip
def test_other_ranks_are_refused(environment: dict[str, str], overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        settled(environment, *overrides)
    assert str(refused.value) == message


def test_steps_and_jobs_on_one_node_meet_at_ports_of_their_own() -> None:
    places = [
        find(STEP_OF_TWO | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}).variables["MASTER_PORT"]
        for job in range(4990, 5010)
        for step in range(50)
    ]
    assert len(set(places)) == len(places)
    assert all(10000 <= int(port) < 20000 for port in places)  # slurm/train.sbatch exports one of 20000 to 29999
    assert find(STEP_OF_TWO | ADDRESS).variables["MASTER_PORT"] == "29500"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n[1-2]", "n1"), ("gpu[007,011-012]", "gpu007"), ("a,b[1-2]", "a"), ("r[1-2]-ib,s3", "r1-ib"),
     ("127.0.1.[1-2]", "127.0.1.1")],
)  # fmt: skip
def test_ranks_of_a_step_meet_on_its_first_node(nodes: str, first: str) -> None:
    assert find(STEP | {"SLURM_STEP_NODELIST": nodes}).variables["MASTER_ADDR"] == first
    assert find(STEP_OF_TWO).variables["MASTER_ADDR"] == "127.0.0.1"


def test_ranks_that_met_are_counted() -> None:
    check_ranks([("n1", "0", 0), ("n1", "0", 1), ("n2", "1", 0), ("n2", "1", 1)], 4)
    check_ranks([("localhost", "0", 0), ("localhost", "1", 0)], 2)  # two nodes of one name
    with pytest.raises(UserError, match="1 ranks have met, and the trainer counts 2"):
        check_ranks([("n1", "0", 0)], 2)
    with pytest.raises(UserError, match="2 ranks on n2 have LOCAL_RANK=0, and would share a device"):
        check_ranks([("n1", "0", 0), ("n2", "1", 0), ("n2", "1", 0)], 3)


def test_a_trainer_of_another_accumulation_is_refused() -> None:
    fives, threes = np.full(8, 5), np.full(8, 3)
    samples = SimpleNamespace(lengths=fives, num_supervised=threes, weight_sums=threes)
    data = SFTDataModule(samples, None, seed=0, epochs=1, max_steps=None, global_batch_size=8, micro_batch_size=2,
                         max_length=5, packing=False)  # fmt: skip
    trainer = L.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False, enable_checkpointing=False)
    data.trainer = trainer
    message = (
        "the trainer accumulates 2 micro-batches, and a step takes 4: 8 packs on 1 ranks in micro-batches of 2: set "
        "accumulate_grad_batches=4"
    )
    with pytest.raises(UserError, match=message):
        data.setup("fit")
    data.setup("validate")  # nothing is accumulated there
    trainer.accumulate_grad_batches = 4
    data.setup("fit")


def test_a_stale_rank_is_refused_before_torch_is_imported(sft: Sft) -> None:
    program = (
        "import atexit, sys; from sft import cli; atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    )
    command = [sys.executable, "-c", program, "train", *sft.settings, "run=run"]
    ended = subprocess.run(command, env=os.environ | {"RANK": "1"}, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "False\n")
    assert ended.stderr.startswith("sft: the environment has RANK=1, as a launcher sets for a rank, without")
    assert len(ended.stderr.splitlines()) == 1
    assert not sft.run_folder().exists()


def test_commands_beside_the_ranks_do_not_mind(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    ranks = ("trainer.devices=2", "trainer.num_nodes=2", "micro_batch_size=1", "strategy=ddp")
    assert sft("preview", *sft.settings, *ranks) == 0


@pytest.mark.parametrize("module", ["sft", "sft.cli"])
def test_is_a_module(module: str) -> None:
    ended = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "fine-tune a model" in ended.stdout, ended.stderr


def test_ranks_of_torchrun_are_those_of_any_launcher(sft: Sft) -> None:
    common = ("train", *sft.settings, "micro_batch_size=1", "max_steps=2", "strategy=ddp")
    expected = sft.ranks(2, *common, "run=expected")
    assert expected.code == 0, expected.output
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", python().executable]
    settings = [*common, "run=run", "trainer.devices=auto"]
    ended = subprocess.run([python().executable, *ranks, "-m", "sft", *settings], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("finished runs/run after 2 steps") == 1
    assert final_files(sft.run_folder()) == final_files(sft.run_folder("expected"))
    assert rows(sft.run_folder()) == rows(sft.run_folder("expected"))


def test_what_is_not_a_rank_enters_as_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")  # so that it is put back
    monkeypatch.setattr(rank_zero_only, "rank", 3)  # from SLURM_PROCID
    environment = Launch().enter()
    assert rank_zero_only.rank == 0
    assert not environment.creates_processes_externally
