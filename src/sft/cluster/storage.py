"""Whether the files and folders of a job exist, can be written, are visible to its nodes, and have room."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from sft.errors import UserError
from sft.runs.files import nearest_existing

LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "squashfs")


def is_local(path: Path) -> bool:
    """Whether other machines are likely to have something else, or nothing, at this path."""
    existing = nearest_existing(path).resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _, kind = max((len(folder), kind) for folder, kind in mounts if existing.is_relative_to(folder))
    return kind in LOCAL_FILE_SYSTEMS or any(existing.is_relative_to(folder) for folder in LOCAL_FOLDERS)


def notes(paths: Mapping[str, Path]) -> list[str]:
    """A note that names the paths on this machine's own disk, and the settings that name them."""
    local = [f"{name} ({path})" for name, path in paths.items() if is_local(path)]
    return [f"on this machine's own disk, which the nodes may not see: {', '.join(local)}"] if local else []


def check_hub(setting: str, name: str, kind: str, offline: str = "HF_HUB_OFFLINE is set") -> list[str]:
    """A note if there is no copy of a Hub repository yet; refuses that if the environment, which a job inherits,
    forbids the download.

    `kind`: models or datasets; `offline`: why there is no download.
    """
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    copies = [hub / f"{kind}--{name.replace('/', '--')}"]
    if kind == "datasets":
        copies.append(Path(constants.HF_HOME) / "datasets" / name.replace("/", "___"))
    if any(copy.exists() for copy in copies):
        return []
    if constants.HF_HUB_OFFLINE:
        raise UserError(
            f"{setting}={name} is neither in {Path.cwd()} nor in {hub}, and {offline}: give a folder, or download it "
            "first"
        )
    return [f"{setting}={name} comes from the Hub: the nodes need the network, or download it first"]


def check_space(runs: Path, model: Path) -> None:
    """Refuses a disk without room for one checkpoint of a local model: three times the bytes of its weights, since the
    optimizer has two states for each."""
    needed = 3 * sum(file.stat().st_size for file in model.glob("*.safetensors"))
    free = shutil.disk_usage(nearest_existing(runs)).free
    if free < needed:
        raise UserError(
            f"{runs} has {free / 1e9:.1f} GB free, and a checkpoint of {model} needs {needed / 1e9:.1f} GB or more: "
            "make room, or set runs_dir to another disk"
        )
