"""A user's mistake in one line: what was wrong, where, and what to do."""

import difflib
import errno
import re
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.runs import failure

CONF = Path(__file__).resolve().parents[2] / "conf"
CONFIGURATION = {"job": "train", "submit": "train"}  # of the commands that have none of their own


def explain(error: BaseException, command: str) -> str | None:
    """The line for a user's mistake; None for an error of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    chain = failure.chain(error)
    for link in chain:
        if isinstance(link, UserError):
            return str(link)
    for link in chain:
        if failure.disk_is_full(link):
            name = getattr(link, "filename", None)
            return "the disk is full" + (f" ({name})" if name else "") + ": make room, then give the command again"
        if isinstance(link, PermissionError) or (isinstance(link, OSError) and link.errno == errno.EROFS):
            return (
                f"{link.filename or 'a file'} can't be written: choose another place with runs_dir= or data.cache_dir="
            )
    for link in chain:
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _explain_override(link, command)
    return None


def _explain_override(error: BaseException, command: str) -> str:
    """Hydra's message in one line, with the nearest setting or the options where a name is unknown."""
    message = " ".join(str(error).split())
    if unknown := re.search(r"Could not override '([^']+)'", message):
        name, shown = unknown[1], CONFIGURATION.get(command, command)
        nearest = _nearest(name, command)
        return f"there is no setting {name}: " + (
            f"did you mean {nearest}?" if nearest else f"see sft {shown} --cfg job"
        )
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        group, option = missing.groups()
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")
        return f"there is no {group}={option}: there are {', '.join(options)}" if options else message
    if mandatory := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{mandatory[1]} must be given: see sft {command} --help"
    return message


def _nearest(name: str, command: str) -> str | None:
    """The setting or group most like an unknown one: the same last part elsewhere, or nearly the same spelling."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(CONFIGURATION.get(command, command))
        known = _names(OmegaConf.to_container(composed, resolve=False))
    known += [path.name for path in CONF.iterdir() if path.is_dir()]
    leaf = name.rpartition(".")[2]
    same_leaf = [each for each in known if each.rpartition(".")[2] == leaf]
    return next(iter(same_leaf or difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def _names(config: Any, prefix: str = "") -> list[str]:
    if not isinstance(config, dict):
        return []
    names = []
    for key, value in config.items():
        names += [f"{prefix}{key}", *_names(value, f"{prefix}{key}.")]
    return names
