"""Sweeps as jobs of a cluster."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sft.cluster.sweep import pick
from sft.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["optimizer.lr=1e-5,2e-5", "data.path='a b'", "seed=0,1,2"]


def test_settings_are_counted_with_the_last_varying_first() -> None:
    picked = [pick(index, SETTINGS) for index in range(6)]
    assert picked[0] == ["optimizer.lr=1e-05", "data.path='a b'", "seed=0"]
    assert picked[1] == ["optimizer.lr=1e-05", "data.path='a b'", "seed=1"]
    assert picked[5] == ["optimizer.lr=2e-05", "data.path='a b'", "seed=2"]


@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_beyond_them_names_the_right_array(index: int) -> None:
    with pytest.raises(UserError, match=r"these are 6 settings, sbatch --array=0-5$"):
        pick(index, SETTINGS)


def batch(folder: Path, index: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """sweep.sbatch as bash runs it, with a train.sbatch that prints what it is given."""
    (folder / "slurm").mkdir()
    (folder / "slurm" / "site.sh").write_text('here() { "$@"; }\n')
    (folder / "slurm" / "train.sbatch").write_text("printf '<%s>\\n' \"$@\"\n")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"SLURM_ARRAY_TASK_ID": index, "PATH": path}
    command = ["bash", ROOT / "slurm" / "sweep.sbatch", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_a_job_of_the_array_trains_its_setting(tmp_path: Path) -> None:
    ended = batch(tmp_path, "4", *SETTINGS)
    assert ended.stdout.splitlines()[1:] == ["<optimizer.lr=2e-05>", "<data.path='a b'>", "<seed=1>"], ended.stderr


@pytest.mark.parametrize(("index", "message"), [("6", "sbatch --array=0-5"), ("", "a sweep is a job array")])
def test_a_job_that_has_no_setting_trains_nothing(tmp_path: Path, index: str, message: str) -> None:
    ended = batch(tmp_path, index, *SETTINGS)
    assert ended.returncode
    assert message in ended.stderr
    assert "<" not in ended.stdout
