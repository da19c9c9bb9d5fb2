"""How a certificate reads: as JSON with every cell, as a page, and as a table on the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sft.proof.cells import GLOBAL_BATCH_SIZE, NUM_STEPS, RESUME_AT, Result
from sft.proof.excerpt import Excerpt
from sft.proof.reference import Reference
from sft.runs import provenance
from sft.runs.files import write_json, write_text

HEAD = ("strategy", "ranks", "pass", "loss", "|grad|", "weights", "tolerance", "seconds")


@dataclass(frozen=True)
class Certificate:
    """All results, and what they were made with."""

    settings: dict[str, Any]
    model: dict[str, Any]  # the small model's configuration
    excerpt: Excerpt
    references: dict[tuple[str, bool], Reference]
    results: list[Result]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def verdict(self) -> str:
        num_passed = sum(result.passed for result in self.results)
        return f"{'passed' if self.passed else 'FAILED'}: {num_passed} of {len(self.results)} cells pass"

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "certificate.json", self.document())
        write_text(folder / "certificate.md", self.page())

    def document(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "num_steps": NUM_STEPS,
            "device": self.settings["device"],
            "precision": self.settings["precision"],
            "references": self._references(),
            "cells": [result.document() for result in self.results],
            "seconds": round(self.seconds, 1),
            "model": self.model,
            "settings": self.settings,
            "provenance": provenance.collect(),
        }

    def table(self) -> Any:
        """A row for each strategy and number of ranks, and a line for each cell that fails."""
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(*(Column(name, no_wrap=True) for name in HEAD), box=None, padding=(0, 2, 0, 0))
        for row in self._rows():
            table.add_row(*row)
        lines = [Text(line, "red") for line in self.failures()[:10]]
        return Group(table, *lines, Text(self.verdict, "bold green" if self.passed else "bold red"))

    def page(self) -> str:
        about = provenance.collect()
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        kind, num_tokens = self.model["model_type"], int(self.excerpt.lengths.sum())
        example = self.results[0].cell
        measure = (
            "each weight of the last checkpoint"
            if example.exact
            else "the change of all weights up to the last checkpoint, whose difference is taken as a share of it"
        )
        clip = self.settings["trainer"]["gradient_clip_val"]
        failures = ["## Cells that fail", "", *(f"- {line}" for line in self.failures()), ""]
        return "\n".join(
            [
                f"# Certificate {self.verdict}",
                "",
                "Each cell is a fit by the code of `sft train`, compared with a plain PyTorch loop in fp32 that shares "
                f"no code with it: the loss of each of {NUM_STEPS} steps (tolerance {example.loss_tolerance:g}) and "
                f"{measure}. A row below shows the largest differences of its cells: {self._axes()}.",
                "",
                *_markdown([name.replace("|", "\\|") for name in HEAD], self._rows()),
                "",
                *(failures if self.failures() else []),
                "## What was trained",
                "",
                f"- model: `{kind}` with {self.model['num_hidden_layers']} layers of {self.model['hidden_size']} "
                f"channels and {self.model['vocab_size']} tokens, random weights, dropout off",
                f"- on the {example.device}, in {example.precision}",
                f"- data: {len(self.excerpt)} samples, {num_tokens} tokens; {GLOBAL_BATCH_SIZE} packs a step, fewer in "
                "an epoch's last, where some ranks have none",
                f"- gradients are clipped to a norm of {clip:.4g}",
                "- the order of the data is the step plan's in both; that each epoch takes each sample once is checked "
                "apart",
                "",
                *_markdown(
                    ("optimizer", "packs", "loss", "largest change of a weight", "steps clipped"),
                    [
                        (
                            each["optimizer"],
                            "packed" if each["packed"] else "unpacked",
                            f"{each['losses'][0]:.3f} to {each['losses'][-1]:.3f}",
                            f"{each['movement']:.2g}",
                            f"{each['num_clipped']} of {NUM_STEPS}",
                        )
                        for each in self._references()
                    ],
                ),
                "",
                f"Made by `{' '.join(['sft', *about['command'][1:]])}` at {about['started']} in {self.seconds:.0f} s; "
                f"commit {about['commit'] or 'unknown'}{' with changes' if about['uncommitted_diff'] else ''}; "
                f"Python {about['python']}, {versions}.",
                "",
            ]
        )

    def _axes(self) -> str:
        """What differs among the cells of a row."""
        cells = [result.cell for result in self.results]
        starts = {True: f"resumed after step {RESUME_AT}", False: "uninterrupted"}
        values = [
            [f"accumulation {number}" for number in sorted({cell.accumulation for cell in cells})],
            [{True: "packed", False: "unpacked"}[packed] for packed in sorted({cell.packed for cell in cells})],
            [starts[resumed] for resumed in sorted({cell.resumed for cell in cells})],
            sorted({cell.optimizer for cell in cells}),
        ]
        return "; ".join(", ".join(each) for each in values)

    def _rows(self) -> list[tuple[str, ...]]:
        rows = []
        for (num_ranks, strategy), group in groupby(self.results, lambda result: result.cell.group):
            made = list(group)
            rows.append(
                (
                    strategy,
                    str(num_ranks),
                    f"{sum(result.passed for result in made)}/{len(made)}",
                    *(_worst([getattr(result, name) for result in made]) for name in ("loss", "grad_norm", "weight")),
                    f"{made[0].cell.tolerance:.0e}",
                    f"{sum(result.seconds for result in made):.0f}",
                )
            )
        return rows

    def failures(self) -> list[str]:
        """A line for each cell that fails."""
        return [
            f"{result.cell}: {result.error or f'loss off by {result.loss:.1e}, weights by {result.weight:.1e}'}"
            for result in self.results
            if not result.passed
        ]

    def _references(self) -> list[dict[str, Any]]:
        clip = self.settings["trainer"]["gradient_clip_val"]
        return [
            {
                "optimizer": optimizer,
                "packed": packed,
                "losses": reference.losses,
                "grad_norms": reference.grad_norms,
                "num_clipped": sum(norm > clip for norm in reference.grad_norms),
                "movement": reference.movement,
            }
            for (optimizer, packed), reference in self.references.items()
        ]


def _worst(numbers: list[float]) -> str:
    """The largest; where one is missing none is."""
    return "none" if any(map(math.isnan, numbers)) else f"{max(numbers):.1e}"


def _markdown(head: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
