"""A user's mistake in one line: what was wrong, where, and what to do."""

import difflib
import errno
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from sft.config import arguments
from sft.config.known_as import known_as
from sft.errors import UnknownSetting, UserError, chain, disk_is_full

CONFIGURATION = {"job": "train", "submit": "train"}  # of the commands that have none of their own

NO_HOME = "Could not determine home directory."  # pathlib's, of ~name/file


def one_line(error: BaseException, command: str) -> str | None:
    """The line for a user's mistake; None for an error of ours."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    links = chain(error)
    for link in links:
        if isinstance(link, UnknownSetting):
            return unknown(link.name, command)
        if isinstance(link, UserError):
            return str(link)
    for link in links:
        if disk_is_full(link):
            name = getattr(link, "filename", None)
            return "the disk is full" + (f" ({name})" if name else "") + ": make room, then run the same command again"
        if isinstance(link, PermissionError) or (isinstance(link, OSError) and link.errno == errno.EROFS):
            return _refused(link)
        if isinstance(link, RuntimeError) and str(link) == NO_HOME:
            return "a path begins with ~ and the name of a user who isn't on this machine: write the path in full"
    for link in links:
        if isinstance(link, HydraException | OmegaConfBaseException):
            return _of_hydra(link, command)
    return None


def _refused(error: OSError) -> str:
    """The line for a file that this user may not read or write."""
    if not error.filename:
        return f"a file can't be used ({error.strerror or error}): see who owns the folders of the run and the data"
    file = Path(str(error.filename))
    with suppress(OSError):  # of a folder that can't be entered
        if file.exists() and not os.access(file, os.R_OK):
            return (
                f"{file} can't be read: chmod or chown it, or name another (data.path, data.val_path, evaluation.text, "
                "model.path)"
            )
        if file.is_file() and not os.access(file, os.W_OK):
            return f"{file} can't be written: chmod or chown it, or name another (output, runs_dir, data.cache_dir)"
    return f"{file} can't be written: set runs_dir or data.cache_dir to another folder"


def unknown(name: str, command: str) -> str:
    """The line for a setting that isn't there: what it is called here, the nearest one, or where it belongs."""
    command = CONFIGURATION.get(command, command)
    names = arguments.names(command)
    group = name.partition(".")[0]
    if name in names and (options := arguments.groups().get(group)):
        return f"there is no setting {name} with the {group} that is chosen: choose another of {', '.join(options)}"
    if here := known_as(name):
        return f"there is no setting {name}; in its place: {here}"
    inside, _, leaf = name.rpartition(".")
    siblings = [setting for setting in names if setting.rpartition(".")[0] == inside]
    same_leaf = [setting for setting in names if setting.rpartition(".")[2] == leaf]
    alike = difflib.get_close_matches(leaf, [setting.rpartition(".")[2] for setting in siblings], n=1)
    if nearest := same_leaf or [f"{inside}.{leaf}".lstrip(".") for leaf in alike]:
        return f"there is no setting {name}: did you mean {nearest[0]}?"
    if inside and siblings:
        return f"there is no setting {name}: {inside} has {', '.join(s.rpartition('.')[2] for s in siblings)}"
    if nearest := difflib.get_close_matches(name, [*names, *arguments.groups()], n=1):
        return f"there is no setting {name}: did you mean {nearest[0]}?"
    own = "; settings of your own go under extra, as extra.NAME=VALUE" if "extra" in names else ""
    return f"there is no setting {name}: see sft {command} --cfg job{own}"


def _of_hydra(error: BaseException, command: str) -> str:
    """Hydra's message in the words of a user of this project."""
    message = " ".join(str(error).split())
    if override := re.search(r"Could not override '([^']+)'", message):
        return unknown(override[1], command)
    if missing := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        group, option = missing.groups()
        options = arguments.groups(_config_dir()).get(group)
        return f"there is no {group}={option}: choose {', '.join(options)}" if options else message
    if mandatory := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{mandatory[1]} must be given: see sft {command} --help"
    if deleted := re.search(r"Could not delete from config\. '([^']+)'", message):
        return f"there is no {deleted[1]} to leave out"
    if primary := re.search(
        r"(?:Cannot find primary config|Primary config directory not found)[^']*'?([^'.]*)", message
    ):
        return f"there is no configuration {primary[1].strip()}: see --config-dir and --config-name"
    setting = re.search(r" full_key: (\S+)", message)
    place = f"{setting[1]}: " if setting else ""
    if target := re.search(r"Error locating target '([^']+)'", message):
        return f"{place}_target_={target[1]} is not found"
    if called := re.search(r"Error in call to target '([^']+)': (.*?)( full_key: \S+)?$", message):
        said = re.sub(r"^\w+\(['\"](.*)['\"],?\)$", r"\1", called[2])
        return f"{place}{called[1]} refuses its settings: {said}"
    message = re.sub(r" (full_key: \S+( object_type=\S+)?|See https://hydra\.cc/\S+( for details)?)$", "", message)
    return f"{place}{message}"


def _config_dir() -> Path | None:
    """The user's own folder of configuration, as it was typed."""
    for before, value in zip(sys.argv, sys.argv[1:], strict=False):
        if before in ("--config-dir", "-cd"):
            return Path(value).expanduser()
    return None
