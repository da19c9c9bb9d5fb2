"""sft check: compare every file of a run with what was written, offline, and say what losing it would cost.

  sft check run=gsm8k-1a2b3c4d

Reads all of the run's folder, its token stores, its data and its model's files. Exit code 1 if anything is damaged,
missing or has changed.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from sft.config.literal import instantiate, literal
from sft.data import store
from sft.data.fingerprint import data_fingerprint
from sft.data.rows import Source
from sft.errors import UserError
from sft.runs import answers_file, config_file, events, manifest, provenance, saved
from sft.runs.lease import duration
from sft.runs.manifest import Damaged
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run
from sft.training.prepare import check_model, model_source

WHOLE = "whole"
UNKNOWN = "no checksum"  # it was written before there were any


@dataclass(frozen=True)
class Part:
    """Of a run. `state`: whole, no checksum, or what is wrong with it; `bytes` None where it has no size of its own."""

    name: str
    state: str
    bytes: int | None
    cost: str  # what losing it would cost

    @property
    def is_whole(self) -> bool:
        return self.state in (WHOLE, UNKNOWN)


def main(config: DictConfig) -> None:
    run = Run.find(config.run, config.runs_dir)
    found = []
    for part in parts(run):
        size = (
            ""
            if part.bytes is None
            else f"{part.bytes / 1e6:,.1f} MB"
            if part.bytes > 1e5
            else f"{part.bytes / 1e3:.1f} kB"
        )
        state = part.state if part.is_whole else "DAMAGED"
        print(f"{part.name:<28} {state:<12} {size:>12}  if lost: {part.cost}", flush=True)
        if not part.is_whole:
            print(f"  {part.state}", flush=True)
        found.append(part)
    wrong = [part.name for part in found if not part.is_whole]
    print(f"{run.folder}: " + (f"not whole: {', '.join(wrong)}" if wrong else f"all {len(found)} parts are whole"))
    sys.exit(1 if wrong else 0)


def parts(run: Run) -> Iterator[Part]:
    """All that a run consists of and was made from."""
    metrics = Metrics.read(run.folder / "metrics.csv")
    seconds = metrics.median("train/seconds")
    yield from _files(run)
    yield from _tables(run, metrics)
    yield from _checkpoints(run, seconds)
    yield from _export(run)
    yield from _inputs(run)


def _part(name: str, look: Callable[[], str], size: int | None, cost: str) -> Part:
    """A part whose state `look` says, or a UserError."""
    try:
        return Part(name, look(), size, cost)
    except UserError as error:
        return Part(name, error.what if isinstance(error, Damaged) else str(error), size, cost)


def _files(run: Run) -> Iterator[Part]:
    """The files that hold their own checksum."""
    costs = {
        "provenance.json": "where the run came from, and what its data and model are compared with when it resumes",
        "status.json": "nothing: sft train writes it again",
        "data.json": "nothing: the next start of sft train writes it again",
    }
    path = run.folder / "config.yaml"
    cost = "the run can't be resumed or exported; its export has a copy"
    yield _part(path.name, partial(_sealed, path), path.stat().st_size, cost)
    for name, cost in costs.items():
        path = run.folder / name
        if path.exists():
            yield _part(name, partial(_sealed, path), path.stat().st_size, cost)
        else:
            yield Part(name, f"{path} is missing", None, cost)


def _sealed(path: Path) -> str:
    """The state of a file that holds its own checksum."""
    if path.name == "config.yaml":
        config_file.read(path.parent)
        return WHOLE if config_file.has_checksum(path.parent) else UNKNOWN
    manifest.read_sealed(path, "")
    return WHOLE if manifest.SEAL in json.loads(path.read_text()) else UNKNOWN


def _tables(run: Run, metrics: Metrics) -> Iterator[Part]:
    """The files that grow by lines: what can be read of them is kept."""
    kept = {
        "metrics.csv": len(metrics.rows) + bool(metrics.columns),
        "events.jsonl": len(events.read(run.folder)),
        "samples.jsonl": len(answers_file.read(run.folder)),
    }
    costs = {
        "metrics.csv": "the curves so far",
        "events.jsonl": "the run's story so far",
        "samples.jsonl": "the answers so far",
    }
    for name, number in kept.items():
        path = run.folder / name
        if path.exists():
            lines = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
            state = WHOLE if lines == number else f"{path}: {lines - number} of {lines} lines can't be read"
            if name == "metrics.csv" and state == WHOLE and (step := _differs_before(run, metrics)):
                state = f"{path}: its figures before step {step} are others than were written"
            yield Part(name, state, path.stat().st_size, costs[name])


def _differs_before(run: Run, metrics: Metrics) -> int | None:
    """The step of the newest checkpoint that can be read, if it has another hash of the rows before it."""
    for step, folder in reversed(saved.folders(run.checkpoints).items()):
        with suppress(Damaged):
            kept = saved.state(folder).get("metrics")  # none of an older checkpoint
            return step if kept not in (None, metrics.digest(step)) else None
    return None


def _checkpoints(run: Run, seconds: float) -> Iterator[Part]:
    """`seconds`: of the median step."""
    folders = saved.folders(run.checkpoints)
    wrong = {step: saved.faults(folder) for step, folder in folders.items()}
    whole = [step for step in folders if not wrong[step]]
    for step, folder in folders.items():
        cost = "this step's export: the run resumes from a later one"
        if whole and step == whole[-1]:
            steps = step - max((other for other in whole if other < step), default=0)
            cost = f"{steps} {'step' if steps == 1 else 'steps'}, {duration(steps * seconds)} of training"
        state = wrong[step][0] if wrong[step] else WHOLE if (folder / manifest.NAME).exists() else UNKNOWN
        yield Part(f"checkpoints/{folder.name}", state, _size(folder), cost)
    for path in sorted(run.checkpoints.glob(f"{saved.ASIDE}*")):
        yield Part(f"checkpoints/{path.name}", "a resume has skipped it: remove it", _size(path), "nothing")


def _export(run: Run) -> Iterator[Part]:
    if not run.export.exists():
        return

    def look() -> str:
        files = run.exported_files("")
        if files is not None and (wrong := manifest.faults(run.export, files)):
            raise Damaged(wrong[0], "")
        return UNKNOWN if files is None else WHOLE

    yield _part("export", look, _size(run.export), f"sft export run={run.folder.name} writes it again")


def _inputs(run: Run) -> Iterator[Part]:
    """The run's data, its token stores and its model, compared with what they were when the run began."""
    try:
        settings, recorded = run.config, cast(dict[str, Any], provenance.recorded(run.folder))
    except Damaged:
        return  # named above
    data = instantiate(settings["data"], _convert_="all")
    cache = Path(data.cache_dir)
    try:
        splits = dict(zip(("train", "validation"), data.sources(), strict=True))
    except UserError as error:
        yield Part("data", str(error), None, "the run can't be resumed")
        splits = {}
    for split, began in (recorded.get("data") or {}).items():
        if split in splits:
            look = partial(_data, splits[split], began, cache)
            yield _part(f"data, {split}", look, None, "the run can't be resumed")
    for split, key in (recorded.get("stores") or {}).items():
        if (folder := cache / "stores" / key).exists():
            cost = "nothing: it is built again from the data"
            yield _part(f"token store, {split}", partial(_store, folder), _size(folder), cost)
    if recorded.get("model"):
        yield _part("model", partial(_model, run), None, "the run can't be resumed or exported")


def _data(sources: list[Source], began: str, cache: Path) -> str:
    digests = [data_fingerprint(source, cache) for source in sources]
    if hashlib.sha256("".join(digests).encode()).hexdigest() != began:
        raise UserError(f"{', '.join(source.path for source in sources)}: the rows have changed since the run began")
    return WHOLE


def _store(folder: Path) -> str:
    store.check(folder, contents=True)
    return WHOLE


def _model(run: Run) -> str:
    source = model_source(literal(run.config), run)
    check_model(run, source, weights=source.adapter is not None)
    return WHOLE


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
