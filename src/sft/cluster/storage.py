"""Whether what a job reads and writes is there, is where its nodes see it, and fits."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from sft.errors import UserError
from sft.runs.run import nearest_existing

OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
OWN_KINDS = ("tmpfs", "ramfs", "overlay", "squashfs")  # of file system


def check_writable(folder: Path, setting: str) -> None:
    """Refuses a folder that can't be made or written: makes a temporary folder there and removes it."""
    existing = nearest_existing(folder)
    try:
        tempfile.TemporaryDirectory(prefix=".sft-", dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({existing}: {error.strerror}): set {setting} to another folder"
        ) from error


def is_own(path: Path) -> bool:
    """Whether a path is likely to be another one on other machines."""
    place = nearest_existing(path).resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    kind = max((len(folder), kind) for folder, kind in mounts if place.is_relative_to(folder))[1]
    return kind in OWN_KINDS or any(place.is_relative_to(folder) for folder in OWN_FOLDERS)


def notes(places: Mapping[str, Path]) -> list[str]:
    """A note where some of the paths, by what sets them, are on this machine's own disk."""
    own = [f"{name} ({path})" for name, path in places.items() if is_own(path)]
    return [f"on this machine's own disk, which the nodes may not see: {', '.join(own)}"] if own else []


def check_hub(setting: str, name: str, kind: str) -> list[str]:
    """A note where there is no copy of a Hub repository yet; refuses that where the environment, which the job
    inherits, forbids the download. `kind`: models or datasets."""
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    copies = [hub / f"{kind}--{name.replace('/', '--')}"]
    if kind == "datasets":
        copies.append(Path(constants.HF_HOME) / "datasets" / name.replace("/", "___"))
    if any(copy.exists() for copy in copies):
        return []
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{setting}={name} is neither here nor in {hub}, and HF_HUB_OFFLINE is set: give a folder, or download it "
            "first"
        )
    return [f"{setting}={name} comes from the Hub: the nodes need the network, or download it first"]


def check_space(runs: Path, model: Path) -> None:
    """Refuses a disk without room for one checkpoint of a local model: its weights, and as much twice for the
    optimizer."""
    needed = 3 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    free = shutil.disk_usage(nearest_existing(runs)).free
    if free < needed:
        raise UserError(
            f"{runs} has {free / 1e9:.1f} GB free, and a checkpoint of {model} needs {needed / 1e9:.1f} GB or more: "
            "make room, or set runs_dir to another disk"
        )
