"""Draws faults, puts them to short runs, and shows what became of these: the sweep and the table of scripts/chaos."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from checks.chaos_faults import KINDS, Kind
from checks.chaos_judge import FAULTS, MISSED, OUTCOMES, Verdict
from checks.chaos_trial import LAYOUTS, LIMIT, Reference, Trial, can_mount, write_assets

BEGIN, END = "<!-- written by scripts/chaos: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Result:
    number: int
    kind: str
    layout: str
    what: str
    verdict: Verdict
    seconds: float

    def line(self) -> str:
        head = f"{self.number:>4}  {self.verdict.outcome:<9} {self.kind}, {self.layout}: {self.what}"
        return head + (f"\n        {self.verdict.why}" if self.verdict.outcome in FAULTS else "")


def drawn(seed: int, number: int, kinds: list[Kind]) -> tuple[Kind, str, Random]:
    """The `number`th fault of a seed, whatever the others: each kind comes as often as its weight says."""
    deck = [kind for kind in kinds for _ in range(kind.weight)]
    Random(f"{seed} {number // len(deck)}").shuffle(deck)
    draw = Random(f"{seed} {number}")
    kind = deck[number % len(deck)]
    return kind, draw.choice(kind.layouts), draw


class Sweep:
    """Trials below `folder`."""

    def __init__(self, folder: Path, kinds: list[Kind], keep: bool = False) -> None:
        self.folder, self.keep = folder.resolve(), keep
        self.kinds, self.skipped = kinds, ""
        if not can_mount(self.folder) and (left := [kind.name for kind in kinds if kind.mounts]):
            self.kinds = [kind for kind in kinds if not kind.mounts]
            self.skipped = f"{' and '.join(left)}: not tried, since only root can mount a small file system"
        assets = self.folder / "assets"
        assets.mkdir()
        write_assets(assets)
        self.references = {
            layout: Reference(self.folder / layout.replace(", ", "-").replace(" ", "-"), assets, layout)
            for layout in LAYOUTS
        }

    def one(
        self, seed: int, number: int, stop: threading.Event | None = None, fault: str = "", limit: float = LIMIT
    ) -> Result | None:
        kind, layout, draw = drawn(seed, number, self.kinds)
        if stop and stop.is_set():
            return None
        reference = self.references[layout]
        reference.make()
        begun = time.monotonic()
        trial = Trial(self.folder / f"trial-{number}", reference, fault, limit)
        try:
            verdict = kind.act(trial, draw)
        finally:
            trial.close()
        if self.keep and verdict.outcome in FAULTS:
            print(f"      kept: {trial.folder}")
        else:
            shutil.rmtree(trial.folder, ignore_errors=True)
        return Result(number, kind.name, layout, trial.what, verdict, time.monotonic() - begun)

    def run(self, seed: int, seconds: float, workers: int, most: int | None = None) -> Iterator[Result]:
        """Results as they come, until so many seconds are over or so many faults have counted."""
        deadline, stop, number, counted = time.monotonic() + seconds, threading.Event(), 0, 0
        pool = ThreadPoolExecutor(workers)
        waiting: set[Future[Result | None]] = set()
        try:
            while waiting or not stop.is_set():
                if time.monotonic() >= deadline or (most is not None and counted >= most):
                    stop.set()
                while len(waiting) < workers and not stop.is_set():
                    waiting.add(pool.submit(self.one, seed, number, stop))
                    number += 1
                done, waiting = wait(waiting, 1, FIRST_COMPLETED)
                for future in done:
                    if (result := future.result()) is not None:
                        counted += result.verdict.outcome != MISSED
                        yield result
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def counts(results: list[Result], kind: str | None = None) -> list[int]:
    """How many faults, and how many of each outcome."""
    outcomes = [r.verdict.outcome for r in results if kind in (None, r.kind) and r.verdict.outcome != MISSED]
    return [len(outcomes), *(outcomes.count(outcome) for outcome in OUTCOMES)]


def table(results: list[Result]) -> str:
    """Markdown that is readable as it is."""
    known = dict.fromkeys(kind.name for kind in KINDS)
    names = [
        name
        for name in (*known, *sorted({result.kind for result in results} - known.keys()))
        if counts(results, name)[0]
    ]
    head = ["fault", "faults", "survived, bit-equal", "refused by name", "lost", "hung", "silent", "traceback"]
    rows = [[name, *map(str, counts(results, name))] for name in names] + [["all", *map(str, counts(results))]]
    widths = [max(len(row[at]) for row in [head, *rows]) for at in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])


def num_faults(results: list[Result]) -> int:
    return sum(result.verdict.outcome in FAULTS for result in results)


def write(page: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Puts the table between its marks in a page."""
    machine = f"{about['minutes']:g} minutes on {about['cores']} cores ({about['cpu']})"
    said = f"`{about['command']}`, {about['date']}, {machine}"
    text, found = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n\n{table(results)}\n\n{said}.\n\n{END}",
        page.read_text(),
        flags=re.DOTALL,
    )
    if not found:
        raise SystemExit(f"scripts/chaos: {page} has no place for the table: {BEGIN} ... {END}")
    page.write_text(text)
