"""What a user has got wrong, in one line."""

import errno
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError

from sft.config import CONF
from sft.errors import UserError
from sft.mistakes import one_line


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lrr=1", "there is no setting optimizer.lrr: did you mean optimizer.lr?"),
        ("schedule=cosinus", "there is no schedule=cosinus: choose constant, cosine, linear, warmup_stable_decay"),
        ("~xyzzy", "there is no xyzzy to leave out"),
        ("model.path=${nowhere}", "model.path: Interpolation key 'nowhere' not found"),
    ],
)
def test_what_hydra_refuses(override: str, line: str) -> None:
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        pytest.raises((HydraException, OmegaConfBaseException)) as refused,
    ):
        OmegaConf.to_container(compose("train", overrides=[override]), resolve=True)
    assert one_line(refused.value, "train") == line


def no_home() -> Exception:
    with pytest.raises(RuntimeError) as raised:
        Path("~no-such-user/a").expanduser()
    return raised.value


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a.bin"),
            "the disk is full (a.bin): make room, then run the same command again",
        ),
        (
            SafetensorError("No space left on device (os error 28)"),
            "the disk is full: make room, then run the same command again",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/a"),
            "runs/a can't be written: set runs_dir or data.cache_dir to another folder",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs/a"),
            "runs/a can't be written: set runs_dir or data.cache_dir to another folder",
        ),
        (
            no_home(),
            "a path begins with ~ and the name of a user who isn't on this machine: write the path in full",
        ),
        (UserError("no data is named"), "no data is named"),
        (OSError(errno.EIO, "Input/output error", "a.bin"), None),
        (ValueError("ours"), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_wherever_it_comes_from(error: Exception, line: str | None) -> None:
    assert one_line(error, "train") == line
    outer = RuntimeError("in a worker")
    outer.__cause__ = error
    assert one_line(outer, "train") == line
