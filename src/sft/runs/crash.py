"""A crash report: what is known of an error that nobody expected, for whoever can mend it, without what is secret."""

import json
import os
import shlex
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sft.runs import provenance
from sft.runs.failure import follows
from sft.runs.plain import plain
from sft.runs.provenance import is_library
from sft.runs.secrets import redacted

if TYPE_CHECKING:
    from omegaconf import DictConfig


def report(error: BaseException, config: "DictConfig | None") -> str:
    """Prints an error of ours in three lines: what, where, and to whom to report it, with the rest in a crash report.
    Returns the first line.

    The report goes to the run's folder if the command has one, else to the system's temporary folder. A rank that only
    lost another one writes none. The traceback is printed where no report can be written.
    """
    settings = _resolved(config)
    message = str(error).strip().partition("\n")[0]
    first = plain(redacted(f"{type(error).__name__}: {message}", settings))[:300]
    path = None
    with suppress(OSError):  # a full disk, say
        path = None if follows(error) else _write_crash(error, settings)
    if path is None and not follows(error):
        traceback.print_exception(error)
    print(f"sft: {first}", file=sys.stderr)
    if path is not None:
        print(f"  at {_place(error)}; all that is known of it: {path}", file=sys.stderr)
        print(f"  report it {_issues()}, with that file", file=sys.stderr, flush=True)
    return first


def _write_crash(error: BaseException, settings: dict[str, object]) -> Path:
    facts = {key: value for key, value in provenance.collect().items() if key not in ("uncommitted_diff", "command")}
    text = "\n".join(
        [
            f"command: {shlex.join(sys.argv)}",
            json.dumps(facts, indent=2),
            json.dumps(settings, indent=2, default=str),
            "".join(traceback.format_exception(error)),
        ]
    )
    folder = _run_folder(settings)
    rank = _rank()
    name = f"crash-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}{f'-rank-{rank}' if rank else ''}"
    path = folder / f"{name}.txt" if folder else Path(tempfile.gettempdir()) / f"sft-{name}-{os.getpid()}.txt"
    with path.open("x") as file:  # never through somebody else's link in the temporary folder
        file.write(redacted(text, settings))
    return path


def _resolved(config: "DictConfig | None") -> dict[str, object]:
    from omegaconf import OmegaConf

    for resolve in (True, False):  # what can't be resolved may be the error
        with suppress(Exception):
            return json.loads(json.dumps(OmegaConf.to_container(config, resolve=resolve), default=str))
    return {}


def _run_folder(settings: dict[str, object]) -> Path | None:
    """The folder of the run that the command was at."""
    from sft.runs.run import Run

    with suppress(Exception):  # no report may fail for lack of a folder
        run = Run.of(settings) if "name" in settings else Run.find(str(settings["run"]), str(settings["runs_dir"]))
        return run.folder if (run.folder / "config.yaml").exists() else None
    return None


def _place(error: BaseException) -> str:
    """File and line of the innermost frame that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not is_library(frame.filename)] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno}" if own else "an unknown place"


def _issues() -> str:
    urls: list[str] = []
    with suppress(PackageNotFoundError):
        urls = metadata("sft").get_all("Project-URL") or []
    addresses = [url.partition(", ")[2] for url in urls if url.lower().startswith("issues, ")]
    return f"at {addresses[0]}" if addresses else "to the maintainers of your copy of sft"


def _rank() -> int:
    return int(next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), 0))


def interrupted(command: str) -> None:
    """Says so in one line, on the first rank."""
    if not _rank():
        resumes = "; the same command resumes from the last checkpoint" if command == "train" else ""
        print(f"sft: interrupted{resumes}", file=sys.stderr, flush=True)
