"""What became of a run that a fault was planted in: the judge of scripts/chaos."""

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from checks.chaos_start import Ended
from sft.runs import saved
from sft.runs.failure import FOLLOWING
from sft.runs.metric import timings

SURVIVED, REFUSED = "survived", "refused"
LOST, HUNG, SILENT, TRACEBACK = "lost", "hung", "silent", "traceback"
FAULTS = (LOST, HUNG, SILENT, TRACEBACK)
OUTCOMES = (SURVIVED, REFUSED, *FAULTS)
MISSED = "missed"  # nothing happened: the run was over before, or did not need what was damaged; it doesn't count

_CRASH = re.compile(
    r"^(Traceback \(most recent call last\)|Fatal Python error|Segmentation fault|terminate called|"
    r".*all that is known of it).*",
    re.MULTILINE,
)
_ADVICE = re.compile(
    r"\b(remove|delete|put|set|give|name|move|restore|start|stop|wait|make|let|run|copy|check|export|resume|end|sft)\b",
    re.IGNORECASE,
)
_REMOVE = re.compile(r"\b(?:remove|delete)(?: the| its)?(?: folder| file)? ([^\s:;,()]+)")


@dataclass(frozen=True)
class Verdict:
    outcome: str
    why: str = ""


@dataclass(frozen=True)
class Truth:
    """What an uninterrupted run leaves: checksums of the last checkpoint's and the export's files, and the metrics."""

    files: dict[str, str]
    rows: list[dict[str, str]]

    @classmethod
    def of(cls, run: Path) -> "Truth":
        """What a run has left; empty where it isn't finished."""
        last = max(saved.folders(run / "checkpoints").values(), default=None)
        files = {"step": last.name} if last else {}
        if last:
            kept = [*last.glob("*.safetensors"), *last.glob("probes*.json")]
            files |= {path.name: digest(path) for path in kept if "callback" not in path.name}
        files |= {f"export/{path.name}": digest(path) for path in run.glob("export/*.safetensors")}
        try:
            with (run / "metrics.csv").open(newline="") as file:
                reader = csv.DictReader(file)
                of_machine = timings(reader.fieldnames or ())
                rows = [{k: v for k, v in row.items() if k not in of_machine} for row in reader]
        except (OSError, ValueError, csv.Error, TypeError):
            rows = []
        return cls(files, rows)

    def differs(self, run: Path, with_metrics: bool = True) -> str | None:
        """What of a finished run isn't as it should be."""
        other = Truth.of(run)
        for name in sorted(self.files.keys() | other.files.keys()):
            if self.files.get(name) != other.files.get(name):
                return f"{name} is another" if name in other.files else f"{name} is missing"
        if with_metrics:
            steps = [row.get("step") for row in other.rows]
            if len(steps) != len(self.rows):
                return f"metrics.csv differs: steps {steps}"
            for mine, its in zip(self.rows, other.rows, strict=True):
                for name in mine.keys() | its.keys():
                    own, value = mine.get(name, ""), its.get(name, "")
                    # A signal leaves the answers of its moment out: they tell of the weights and change none.
                    if value != own and not (name.startswith("answers/") and not value):
                        return f"metrics.csv differs: {name} of step {mine.get('step')} is {value}, not {own}"
        return None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def crashed(ended: Ended) -> str | None:
    """The first line of a traceback or crash report, with the last line of the output."""
    found = _CRASH.search(ended.output)
    lines = [line for line in ended.output.strip().splitlines() if line.startswith("sft:")] or [""]
    return f"{found[0].strip()[:40]} ... {lines[-1][:240]}" if found else None


def refusal(ended: Ended, names: Iterable[str]) -> str | None:
    """The line in which a command refuses, if it names one of `names` and gives an advice; None where it doesn't. A
    rank that only says that it has lost another says nothing of it."""
    for line in reversed(ended.output.splitlines()):
        if line.startswith("sft:") and not FOLLOWING.search(line.removeprefix("sft: ")):
            named = any(name in line for name in names)
            return line if named and _ADVICE.search(line.partition(":")[2]) else None
    return None


def to_remove(line: str) -> str | None:
    """What the advice of a refusal says to remove."""
    found = _REMOVE.search(line)
    return found[1].strip("'\"").rstrip(".") if found else None


def resumed(ended: Ended) -> bool:
    """Whether a start has resumed from a checkpoint."""
    found = re.search(r"resumed after step (\d+)", ended.output)
    return bool(found and int(found[1])) or "is finished" in ended.output


def says(outputs: Iterable[Ended], names: Iterable[str]) -> bool:
    """Whether one of the names was mentioned."""
    text = "\n".join(ended.output for ended in outputs)
    return any(name in text for name in names)
