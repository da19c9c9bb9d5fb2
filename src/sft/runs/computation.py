"""What decides a run's numbers beyond its configuration: the code that trains it, functions of the user's own, versions
of libraries. Each start keeps a fingerprint of it in `events.jsonl`, so that a change between two starts is said and
recorded, and a run doesn't continue with other tokens or another loss unless that is allowed."""

import ast
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeGuard, TypeVar

from sft.errors import UserError
from sft.runs import events, provenance
from sft.runs.events import Computation, Event
from sft.runs.identity import Config, flatten

PACKAGE = Path(__file__).parents[1]
NUM_DIGITS = 16
# The parts of this package, each with patterns of its files; a file is of the first that matches. What only shows,
# starts or exports a run is in none.
PARTS = {
    "mask": ("data/mask.py", "data/labels.py", "data/encoding.py", "data/samples.py", "data/message.py"),
    "template": (
        "data/chat_template.py",
        "data/rendering.py",
        "data/clock.py",
        "data/outline.py",
        "data/pieces.py",
        "data/tool_calls.py",
    ),
    "loss": ("model/loss.py", "model/head.py", "model/router.py", "training/module.py"),
    "around the data": ("data/ledger.py", "data/fingerprint.py", "data/staging.py", "data/prompt.py", "data/shape*.py"),
    "data": ("data/*.py",),
    "other": ("model/*.py", "training/*.py", "checkpoint/*.py", "evaluation/*.py", "ranks.py"),
}
REFUSED = ("mask", "template", "loss", "data")
OWN = "own "  # begins the part of a user's function, named by its setting
IMPORTED = "imported"  # the project's other modules that were loaded
# Settings under which a function of the user's own decides the numbers.
DECIDING = ("data", "model", "adapter", "optimizer", "schedule", "averaging")
PROMPT = ("mask", "template", "data", f"{OWN}data.conversation")  # what turns a row into tokens
PACKAGES = (
    *("torch", "transformers", "lightning", "deepspeed", "peft", "tokenizers", "safetensors", "datasets", "numpy"),
    *("liger-kernel", "flash-attn", "flash-linear-attention", "mamba-ssm", "causal-conv1d", "kernels", "bitsandbytes"),
    *("triton", "torchao"),
)
INSTALLED = (
    *(sysconfig.get_path(name) + "/" for name in ("stdlib", "platstdlib", "purelib", "platlib")),
    str(PACKAGE) + "/",
)
MOST = 6  # changes that a line names

Files = dict[str, str]  # file → its hash
T = TypeVar("T")


class Together(Protocol):
    """Each rank's result of what all of them do, as `sft.ranks.together`."""

    def __call__(self, action: Callable[[], T], /) -> list[T]: ...


@dataclass(frozen=True)
class Change:
    part: str
    said: str  # "data/mask.py changed"

    @property
    def refused(self) -> bool:
        own = self.part.removeprefix(OWN) if self.part.startswith(OWN) else ""
        return self.part in REFUSED or own.partition(".")[0] in DECIDING


def now(config: Config) -> Computation:
    """That of this process, under a run's configuration."""
    files = _of_package()
    for setting, target in targets(config):
        if found := _of_module(target):
            files[f"{OWN}{setting}"] = found
    named = {name for part in files.values() for name in part}
    files[IMPORTED] = {name: _hash(file) for name, file in sorted(_loaded().items()) if name not in named}
    versions = {package: known for package in PACKAGES if (known := provenance.installed(package))}
    return {"files": files, "versions": {"python": platform.python_version(), **versions}}


def changes(before: Computation, after: Computation) -> list[Change]:
    """Those that are refused come first."""
    found = []
    for part in sorted(before["files"].keys() | after["files"].keys()):
        if part not in PARTS and not (part in before["files"] and part in after["files"]):
            continue  # the setting itself is another, which is for the run's name to say
        old, new = before["files"].get(part, {}), after["files"].get(part, {})
        for name in sorted(old.keys() | new.keys()):
            if name in old and name in new:
                if old[name] != new[name]:
                    found.append(Change(part, f"{name} changed"))
            elif part != IMPORTED:  # what is loaded, and when, differs between two starts
                found.append(Change(part, f"{name} is {'new' if name in new else 'gone'}"))
    ours, theirs = before["versions"], after["versions"]
    for package in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get(package, "none"), theirs.get(package, "none")
        if one != other:
            found.append(Change("versions", f"{package} {one} → {other}"))
    return sorted(found, key=lambda change: not change.refused)


def said(found: Sequence[Change]) -> str:
    """In one line."""
    more = f"; {len(found) - MOST} more" if len(found) > MOST else ""
    return "; ".join(change.said for change in found[:MOST]) + more


def check(folder: Path, config: Config, allow: Iterable[str], step: int) -> str | None:
    """What a run's log should say of resuming after `step`, if anything. UserError for a change of what makes the
    samples or the loss, or of a user's function that decides the numbers, unless `code` is allowed."""
    story = taken(events.read(folder), step)
    before = recorded(events.read(folder), story[-1]) if story else None
    if before is None:  # an older run, or its events are lost
        return (
            f"{folder} has no record of the code and versions that it was trained with: they are not compared this time"
        )
    found = changes(before, now(config))
    refused = [change for change in found if change.refused]
    if refused and "code" not in allow:
        raise UserError(
            f"what {folder} computes would change after step {step}: {said(refused)}: put back what was there, start "
            "another run with run=NAME, or continue with the change by resume.allow=[code]"
        )
    return f"since step {step}: {said(found)}" if found else None


def at_start(folder: Path, config: Config, allow: Iterable[str], step: int) -> dict[str, object]:
    """What the event of a start keeps: the commit and the fingerprint, whole where no earlier start has the same, and
    what has changed since the start before."""
    story, computation = events.read(folder), now(config)
    digest = _digest(computation)
    details: dict[str, object] = {"commit": provenance.commit(), "computation": digest}
    if recorded(story, {"computation": digest}) is None:  # type: ignore[typeddict-item]
        details["code"] = computation
        if hidden := _untracked(computation):
            details["untracked"] = hidden
    before = taken(story, step)
    known = recorded(story, before[-1]) if before else None
    if known and (found := changes(known, computation)):
        details["changed"] = said(found)
        if any(change.refused for change in found):
            details["allowed"] = list(allow)
    return details


def check_ranks(config: Config, together: Together, node: str) -> str | None:
    """What the log should say of versions that differ between the ranks' nodes, if anything. UserError where a rank has
    other code than the first."""
    own = now(config)
    del own["files"][IMPORTED]  # the first rank loads more than the others
    if len({*together(lambda: _digest(own))}) == 1:
        return None
    (first, of_first), *others = together(lambda: (node, own))
    lines = []
    for other, of_other in others:
        found = changes(of_first, of_other)
        between = f"between the ranks on {first} and {other}: {said(found)}"
        if any(change.part != "versions" for change in found):
            raise UserError(f"the code differs {between}: put the same code on each node")
        lines += [f"note: versions differ {between}"] if found else []
    return lines[0] if lines else None


def note(folder: Path, config: Config, parts: Sequence[str] = PROMPT) -> str | None:
    """For a command that uses a trained run: which of these parts are no longer what the run was trained with."""
    story = events.read(folder)
    chain = taken(story)
    before = recorded(story, chain[-1]) if chain else None
    found = [change for change in changes(before, now(config)) if change.part in parts] if before else []
    return f"note: {said(found)} since {folder} was trained: prompts may get other tokens now" if found else None


def taken(story: Sequence[Event], step: int | None = None) -> list[Event]:
    """The starts whose steps are part of the weights after `step`: one that begins at an earlier step, or at the same,
    takes the place of those before it."""
    chain: list[Event] = []
    for event in story:
        if event.get("event") != "start" or not isinstance(event.get("step"), int):
            continue
        while chain and chain[-1]["step"] >= event["step"]:
            chain.pop()
        chain.append(event)
    return chain if step is None else [event for event in chain if event["step"] < step]


def recorded(story: Sequence[Event], start: Event) -> Computation | None:
    """The fingerprint of a start; None of one that has none."""
    digest = start.get("computation")
    for event in story:
        if digest and event.get("computation") == digest and (code := event.get("code")) and _digest(code) == digest:
            return code
    return None


def history(folder: Path, step: int) -> dict[str, str]:
    """For the model card of a step's weights: the commits that took part and what changed on the way."""
    story = events.read(folder)
    chain = taken(story, step)
    commits: list[str] = []
    for event in chain:
        if (commit := event.get("commit")) and commit not in commits:
            commits.append(commit)
    proofs = [event for event in story if event.get("event") == "first_batch" and event.get("step", 0) < step]
    changed = [f"since step {event['step']}: {text}" for event in chain + proofs if (text := event.get("changed"))]
    untracked = {name: digest for event in chain for name, digest in event.get("untracked", {}).items()}
    return {
        **({"commits": ", ".join(commits)} if len(commits) > 1 else {}),
        **({"changed": "; ".join(changed)} if changed else {}),
        **({"code in no commit": ", ".join(f"{k} ({v})" for k, v in untracked.items())} if untracked else {}),
    }


def targets(config: Config) -> Iterator[tuple[str, str]]:
    """Each setting that names a function or class which is neither this package's nor of its libraries."""
    for name, value in sorted(flatten(config).items()):
        setting, _, last = name.rpartition(".")
        if last == "_target_" and isinstance(value, str) and not value.startswith(("sft.", "torch.", "lightning.")):
            yield setting, value


def _of_package() -> dict[str, Files]:
    files: dict[str, Files] = {part: {} for part in PARTS}
    seen: set[str] = set()
    for part, patterns in PARTS.items():
        for pattern in patterns:
            for file in sorted(PACKAGE.glob(pattern)):
                if (name := file.relative_to(PACKAGE).as_posix()) not in seen:
                    seen.add(name)
                    files[part][name] = _hash(file)
    return files


def _of_module(target: str) -> Files:
    """The files of a target's module and of the project's modules that it imports; none of an installed package."""
    found: Files = {}
    waiting = [target]
    while waiting:
        file = _source(name := waiting.pop())
        while file is None and "." in name:  # the name of something in a module
            name = name.rpartition(".")[0]
            file = _source(name)
        if not _own(file) or (known := _name(name, file)) in found:
            continue
        found[known] = _hash(file)
        waiting += _imports(name, file)
    return dict(sorted(found.items()))


def _imports(module: str, file: Path) -> Iterator[str]:
    """The names that a module's source imports, in its functions too, from the root on."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    with suppress(OSError, SyntaxError, ValueError):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                place = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, (place, node.module)))
                yield from (f"{source}.{alias.name}" for alias in node.names)


def _source(name: str) -> Path | None:
    """The file of a module, loaded or not; None where no module has this name."""
    file = getattr(sys.modules.get(name), "__file__", None)
    if name not in sys.modules:
        with suppress(Exception):  # whatever a parent package raises: who needs it says so
            spec = importlib.util.find_spec(name)
            file = spec and spec.origin
    return Path(file) if isinstance(file, str) else None


def _own(file: Path | None) -> TypeGuard[Path]:
    """Whether a source is neither this package's nor installed."""
    path = str(file)
    return (
        path.endswith(".py")
        and not path.startswith(INSTALLED)
        and not any(f"/{folder}/" in path for folder in ("site-packages", "dist-packages", "transformers_modules"))
    )


def _name(module: str, file: Path) -> str:
    """A module's file, from where it is imported on: a project that moves is the same."""
    place = module.replace(".", "/")
    return f"{place}/__init__.py" if file.name == "__init__.py" else f"{place}.py"


def _loaded() -> dict[str, Path]:
    """The project's modules in this process."""
    files = {name: _source(name) for name in list(sys.modules) if name not in ("__main__", "__mp_main__")}
    return {_name(name, file): file for name, file in files.items() if _own(file)}


def _hash(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()[:NUM_DIGITS]
    except OSError:
        return "unreadable"


def _digest(computation: Computation) -> str:
    return hashlib.sha256(json.dumps(computation, sort_keys=True).encode()).hexdigest()[:NUM_DIGITS]


def _untracked(computation: Computation) -> Files:
    """Of the user's own files, those that git doesn't know, with their hashes: no commit and no diff has them."""
    places = _loaded()
    own = [files for part, files in computation["files"].items() if part not in PARTS]
    named = {name: digest for files in own for name, digest in files.items()}
    return {name: digest for name, digest in named.items() if name in places and not _tracked(places[name])}


def _tracked(file: Path) -> bool:
    """Also true where there is no checkout or no git: then there is no commit to be outside of."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--others", "--", file.name],
            cwd=file.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return True
    return not listed.stdout.strip()
