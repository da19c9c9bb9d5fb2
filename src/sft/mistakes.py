"""A user's mistake in one line: what was wrong, where, and what to do."""

import difflib
import errno
import re
from pathlib import Path

from sft.errors import UserError, chain, disk_is_full
from sft.runs.identity import flatten

CONF = Path(__file__).resolve().parents[2] / "conf"
CONFIGURATION = {"job": "train", "submit": "train"}  # of the commands that have none of their own


def one_line(error: BaseException, command: str) -> str | None:
    """The line for a user's mistake; None for an error of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    links = chain(error)
    for link in links:
        if isinstance(link, UserError):
            return str(link)
    for link in links:
        if disk_is_full(link):
            name = getattr(link, "filename", None)
            return "the disk is full" + (f" ({name})" if name else "") + ": make room, then run the same command again"
        if isinstance(link, PermissionError) or (isinstance(link, OSError) and link.errno == errno.EROFS):
            return f"{link.filename or 'a file'} can't be written: set runs_dir or data.cache_dir to another folder"
    for link in links:
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _of_hydra(" ".join(str(link).split()), command)
    return None


def _of_hydra(message: str, command: str) -> str:
    """Hydra's message, with the nearest setting or the options if a name is unknown."""
    configuration = CONFIGURATION.get(command, command)
    if unknown := re.search(r"Could not override '([^']+)'", message):
        nearest = _nearest(unknown[1], configuration)
        advice = f"did you mean {nearest}?" if nearest else f"see sft {configuration} --cfg job"
        return f"there is no setting {unknown[1]}: {advice}"
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        group, option = missing.groups()
        options = sorted(path.stem for path in (CONF / group).glob("*.yaml") if path.stem != "base")
        return f"there is no {group}={option}: choose {', '.join(options)}" if options else message
    if mandatory := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{mandatory[1]} must be given: see sft {command} --help"
    return message


def _nearest(name: str, configuration: str) -> str | None:
    """The setting or group most like an unknown one: with the same last part, or else with nearly the same spelling."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(CONF), version_base="1.3"):
        settings = [name.split(".") for name in flatten(OmegaConf.to_container(compose(configuration), resolve=False))]
    names = [".".join(parts[:end]) for parts in settings for end in range(1, len(parts) + 1)]
    names += [path.name for path in CONF.iterdir() if path.is_dir()]
    same_leaf = [setting for setting in names if setting.rpartition(".")[2] == name.rpartition(".")[2]]
    return next(iter(same_leaf or difflib.get_close_matches(name, names, n=1)), None)
