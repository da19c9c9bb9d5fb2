"""Ranks started in the ways that an allocation offers train the same run, to the bit."""

import sys
from pathlib import Path

import pytest

from cluster import Cluster
from runfiles import final_files, rows
from running import Sft
from warm import python

pytestmark = [pytest.mark.xdist_group("slurm too"), pytest.mark.timeout(600)]

# All three at once on one node. Lightning would take the tasks of a step of this name for an interactive shell.
SCRIPT = """#!/bin/bash
python=$1 && shift
srun --overlap --ntasks=2 --job-name=interactive $python -m sft train "$@" run=tasks trainer.devices=2 &
srun --overlap --ntasks=1 $python -m sft train "$@" run=devices trainer.devices=2 &
$python -m torch.distributed.run --standalone --nproc-per-node=2 --no-python \\
    $python -m sft train "$@" run=torchrun trainer.devices=auto &
wait
"""


def test_tasks_devices_and_torchrun_within_sbatch(cluster: Cluster, sft: Sft) -> None:
    settings = [*sft.settings, "micro_batch_size=1", "max_steps=2", "export=false", "strategy=ddp"]
    expected = sft.ranks(2, "train", *settings, "run=expected")
    assert expected.code == 0, expected.output
    (sft.folder / "job.sh").write_text(SCRIPT)
    options = ["--nodes=1", "--ntasks=2", "--cpus-per-task=1", f"--output={sft.folder}/%j.out"]
    # Slurm starts the ranks' clients: the ranks themselves are forked, outside of the node, in its environment.
    job = cluster.submit(*options, str(sft.folder / "job.sh"), python().executable, *settings, cwd=sft.folder)
    printed = Path(cluster.wait(job, "COMPLETED")["StdOut"]).read_text()
    for run in ("tasks", "devices", "torchrun"):
        folder = sft.run_folder(run)
        assert printed.count(f"finished runs/{run} after 2 steps") == 1, printed
        assert final_files(folder) == final_files(sft.run_folder("expected"))
        assert rows(folder) == rows(sft.run_folder("expected"))


def test_what_an_allocation_does_not_start_is_refused(cluster: Cluster, sft: Sft) -> None:
    command = [sys.executable, "-m", "sft", "train", *sft.settings, "strategy=ddp", "run=run"]
    refused = cluster.exec("srun", "--ntasks=2", *command, cwd=sft.folder)
    assert refused.returncode == 2
    assert "sft: srun started 2 ranks on 1 node, and trainer.devices=1" in refused.stderr
    # Its shell is no step: the ranks would be started by this process, and those of the other node by nobody.
    refused = cluster.exec("salloc", "--nodes=2", *command, "trainer.num_nodes=2", cwd=sft.folder)
    assert refused.returncode == 2
    assert "sft: trainer.num_nodes=2 means 2 ranks, and nobody started them: use sft submit, srun" in refused.stderr
    assert not sft.run_folder().exists()
