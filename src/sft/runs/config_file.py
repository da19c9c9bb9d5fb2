"""`config.yaml`: a run's resolved configuration. Its first line is a comment with the checksum of what stands below."""

from pathlib import Path

import yaml
from xxhash import xxh3_128

from sft.runs.files import write_text
from sft.runs.identity import Config, deciding
from sft.runs.manifest import Damaged

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same in a tenth of the time, where PyYAML has it
SEAL = "# checksum: "
ADVICE = "put back a copy (the README.md of the run's export has it, too)"


def write(folder: Path, config: Config) -> None:
    text = yaml.safe_dump(dict(config), sort_keys=False)
    write_text(folder / "config.yaml", f"{SEAL}{_checksum(text)}\n{text}")


def has_checksum(folder: Path) -> bool:
    """False for the configuration of a run from before there were checksums."""
    return (folder / "config.yaml").read_bytes().startswith(SEAL.encode())


def text(folder: Path) -> str:
    """Without the checksum. Damaged where that is another; a file without any was written before there were any."""
    path = folder / "config.yaml"
    try:
        written = path.read_text()
    except UnicodeDecodeError:
        raise Damaged(f"{path} is damaged (it is no text)", ADVICE) from None
    if not written.strip():
        raise Damaged(f"{path} is empty", ADVICE)
    if not written.startswith(SEAL):
        return written
    checksum, _, below = written.removeprefix(SEAL).partition("\n")
    if checksum != _checksum(below):
        raise Damaged(f"{path} is damaged (its checksum is another)", ADVICE)
    return below


def read(folder: Path) -> Config:
    """Damaged where it isn't what was written; FileNotFoundError."""
    written = text(folder)
    try:
        config: object = yaml.load(written, Loader=LOADER)
        deciding(config)  # type: ignore[arg-type]  # it may be anything that isn't of settings
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise Damaged(f"{folder / 'config.yaml'} is damaged (it is no configuration)", ADVICE)
    return config


def is_damaged(folder: Path) -> bool:
    try:
        read(folder)
    except Damaged:
        return True
    return False


def _checksum(text: str) -> str:
    return xxh3_128(text.encode()).hexdigest()
