"""The job that sbatch options, site.sh and the #SBATCH lines make."""

import re
from pathlib import Path
from typing import Any

import pytest

from sft.cluster.sbatch import Job, site_environment
from sft.cluster.time_limit import duration
from sft.errors import UserError

SCRIPT = """\
#!/bin/bash
# What it does.
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8         # EDIT: a node's GPUs
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
set -e
#SBATCH --nodes=99
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "train.sbatch").write_text(SCRIPT)
    (tmp_path / "slurm" / "site.sh").write_text("")
    return tmp_path


def job(options: str, project: Path) -> Job:
    return Job.of([*options.split(), "--", "a=1"], project)


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ("", {}),
        ("--nodes=4", {"nodes": 4}),
        ("-N 4 -n16 --ntasks-per-node 4 --mem 1G -c3", {"nodes": 4, "tasks": 4, "cpus": 3}),
        ("--gpus-per-node=a100:2,v100:3", {"gpus": 5}),
        ("--nodes=2 --gres=shard:1,gpu:a100:8", {"nodes": 2, "gpus": 8}),
        ("--gpus-per-node=0 --ntasks-per-n=2", {"gpus": 0, "tasks": 2}),
        ("-t 1-12 --signal=R:SIGTERM", {"limit": 36 * 3600, "signal_seconds_before_end": 60}),
        ("-pa,b -A me", {"partitions": ["a", "b"]}),
        ("-J name -o %x.log", {"output": "%x.log"}),
    ],
)
def test_the_script_and_options_make_a_job(options: str, changed: dict[str, Any], project: Path) -> None:
    expected: dict[str, Any] = {
        "nodes": 1,
        "tasks": 8,
        "gpus": 8,
        "cpus": 12,
        "limit": 24 * 3600,
        "signal_seconds_before_end": 300,
        "partitions": [],
        "output": None,
    } | changed
    parsed = job(options, project)
    assert {name: getattr(parsed, name) for name in expected} == expected
    assert parsed.options == options.split()
    ranks = [f"trainer.num_nodes={expected['nodes']}", f"trainer.devices={expected['tasks']}"]
    assert parsed.overrides == ["a=1", *ranks]


def test_site_goes_before_the_script_and_options_before_both(project: Path) -> None:
    site = "export SBATCH_PARTITION=site SBATCH_TIMELIMIT=60 SBATCH_GPUS_PER_NODE=4\nSBATCH_ACCOUNT=not-exported\n"
    (project / "slurm" / "site.sh").write_text(site)
    parsed = job("--partition=typed", project)
    assert (parsed.partitions, parsed.limit, parsed.gpus) == (["typed"], 3600, 4)
    assert parsed.environment["SBATCH_PARTITION"] == "site" and "SBATCH_ACCOUNT" not in parsed.environment
    (project / "slurm" / "site.sh").write_text("module load cuda/12\n")
    site_environment.cache_clear()
    with pytest.raises(UserError, match=r"^slurm/site.sh fails, as it would in the job: .*module: command not found$"):
        job("", project)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("4:00:00", 14400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:05", 172805),
        ("infinite", float("inf")),
        ("0", float("inf")),
    ],
)
def test_duration(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--nodes=2-4", "--nodes=2-4 is not a whole number from 1 on"),
        ("--ntasks=12", "--ntasks=12 is not 1 nodes × 8 tasks: set --nodes and --ntasks-per-node"),
        (
            "--gres=gpu:4",
            "--gpus-per-node=8 and --gres=gpu:4 differ: set --gpus-per-node alone",
        ),
        (
            "-G 8",
            "--gpus is not for sft submit: each rank drives one of the GPUs of its node and must see the others: set "
            "--gpus-per-node",
        ),
        (
            "--gpus-per-task=a100:1",
            "--gpus-per-task is not for sft submit: each rank drives one of the GPUs of its node and must see the "
            "others: set --gpus-per-node",
        ),
        ("--time=1h", "--time=1h is no time: set it like 30 (minutes), 4:00:00 or 1-12:00:00"),
        (
            "--signal=B:USR1@60",
            "--signal=B:USR1@60 goes to the batch script alone, but the ranks save: leave out B:",
        ),
        (
            "--signal=INT@60",
            "--signal=INT@60 is no signal that the ranks save on (USR1 or TERM): set --signal=USR1@300",
        ),
        (
            "-a 0-3",
            "--array is not for sft submit: a job trains one run; for many, sbatch --array with slurm/sweep.sbatch",
        ),
        ("--nodes", "options of sbatch: argument -N/--nodes: expected one argument: see sbatch --help"),
    ],
)
def test_options_that_make_no_job(options: str, message: str, project: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        job(options, project)
