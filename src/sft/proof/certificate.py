"""How a certificate reads: as JSON with every cell, as a page, and as a table on the terminal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from sft.proof.cells import GLOBAL_BATCH_SIZE, NUM_STEPS, RESUME_AT, CellResult
from sft.proof.excerpt import Excerpt
from sft.proof.reference import Reference
from sft.runs import provenance
from sft.runs.files import write_json, write_text

if TYPE_CHECKING:
    from rich.console import Group

HEAD = ("strategy", "ranks", "pass", "loss", "|grad|", "weights", "tolerance", "seconds")


@dataclass(frozen=True)
class Certificate:
    """All results and the settings that they were made with."""

    config: DictConfig
    model: dict[str, Any]  # the small model's configuration
    excerpt: Excerpt
    references: dict[tuple[str, bool], Reference]  # by optimizer and packed
    results: list[CellResult]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    @property
    def verdict(self) -> str:
        num_passed = sum(result.passed for result in self.results)
        return f"{'passed' if self.passed else 'FAILED'}: {num_passed} of {len(self.results)} cells pass"

    def failures(self) -> list[str]:
        """A line for each cell that fails."""
        return [
            f"{result.cell}: {result.error or f'loss off by {result.loss:.1e}, weights by {result.weight:.1e}'}"
            for result in self.results
            if not result.passed
        ]

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "certificate.json", self.document())
        write_text(folder / "certificate.md", self.page())

    def document(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "num_steps": NUM_STEPS,
            "device": self.config.device,
            "precision": self.config.precision,
            "references": [
                {
                    "optimizer": optimizer,
                    "packed": packed,
                    "losses": reference.losses,
                    "grad_norms": reference.grad_norms,
                    "num_clipped": self._num_clipped(reference),
                    "movement": reference.movement,
                }
                for (optimizer, packed), reference in self.references.items()
            ],
            "cells": [result.document() for result in self.results],
            "seconds": round(self.seconds, 1),
            "model": self.model,
            "settings": OmegaConf.to_container(self.config, resolve=True),
            "provenance": provenance.collect(),
        }

    def table(self) -> "Group":
        """A row for each strategy and number of ranks, and a line for each of the first cells that fail."""
        from rich.console import Group
        from rich.table import Column, Table
        from rich.text import Text

        table = Table(*(Column(name, no_wrap=True) for name in HEAD), box=None, padding=(0, 2, 0, 0))
        for row in self._rows():
            table.add_row(*row)
        lines = [Text(line, "red") for line in self.failures()[:10]]
        return Group(table, *lines, Text(self.verdict, "bold green" if self.passed else "bold red"))

    def page(self) -> str:
        from transformers import AutoConfig

        cell, about = self.results[0].cell, provenance.collect()
        model = AutoConfig.for_model(**self.model)  # by the names that all families have
        weights = "each weight" if cell.exact else "all weights, as a share of their change,"
        lines = [
            f"# Certificate {self.verdict}",
            "",
            "Each cell is a fit by the code of `sft train`, compared with a plain PyTorch loop in fp32 that shares no "
            f"code with it: the loss of each of {NUM_STEPS} steps (tolerance {cell.loss_tolerance:g}) and {weights} in "
            f"the last checkpoint. A row shows the largest differences of its cells: {self._axes()}.",
            "",
            *_markdown([name.replace("|", "\\|") for name in HEAD], self._rows()),
            "",
        ]
        if not self.passed:
            lines += ["## Cells that fail", "", *(f"- {line}" for line in self.failures()), ""]
        lines += [
            "## What was trained",
            "",
            f"- model: `{model.model_type}` with {model.num_hidden_layers} layers of {model.hidden_size} "
            f"channels and {model.vocab_size} tokens, random weights, dropout off",
            f"- on the {cell.device}, in {cell.precision}",
            f"- data: {len(self.excerpt)} samples, {self.excerpt.lengths.sum()} tokens; {GLOBAL_BATCH_SIZE} packs a "
            "step, fewer in an epoch's last step, where some ranks have none",
            f"- gradients are clipped to a norm of {self.config.trainer.gradient_clip_val:.4g}",
            "- both take the samples in the step plan's order; that each epoch takes each sample once is checked apart",
            "",
            *_markdown(
                ("optimizer", "packs", "loss", "largest change of a weight", "steps clipped"),
                [
                    (
                        optimizer,
                        "packed" if packed else "unpacked",
                        f"{reference.losses[0]:.3f} to {reference.losses[-1]:.3f}",
                        f"{reference.movement:.2g}",
                        f"{self._num_clipped(reference)} of {NUM_STEPS}",
                    )
                    for (optimizer, packed), reference in self.references.items()
                ],
            ),
            "",
            f"Made by `{' '.join(['sft', *about['command'][1:]])}` at {about['started']} in {self.seconds:.0f} s; "
            f"commit {about['commit'] or 'unknown'}{' with changes' if about['uncommitted_diff'] else ''}; "
            f"Python {about['python']}, "
            f"{', '.join(f'{name} {version}' for name, version in about['versions'].items())}.",
            "",
        ]
        return "\n".join(lines)

    def _axes(self) -> str:
        """What differs among the cells of a row."""
        cells = [result.cell for result in self.results]
        axes = (
            {f"accumulation {cell.accumulation}" for cell in cells},
            {"packed" if cell.packed else "unpacked" for cell in cells},
            {f"resumed after step {RESUME_AT}" if cell.resumed else "uninterrupted" for cell in cells},
            {cell.optimizer for cell in cells},
        )
        return "; ".join(", ".join(sorted(values)) for values in axes)

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for (num_ranks, strategy), group in groupby(self.results, lambda result: result.cell.group):
            results = list(group)
            rows.append(
                (
                    strategy,
                    str(num_ranks),
                    f"{sum(result.passed for result in results)}/{len(results)}",
                    _largest([result.loss for result in results]),
                    _largest([result.grad_norm for result in results]),
                    _largest([result.weight for result in results]),
                    f"{results[0].cell.tolerance:.0e}",
                    f"{sum(result.seconds for result in results):.0f}",
                )
            )
        return rows

    def _num_clipped(self, reference: Reference) -> int:
        return sum(norm > self.config.trainer.gradient_clip_val for norm in reference.grad_norms)


def _largest(differences: list[float]) -> str:
    """`none` if one is missing."""
    return "none" if any(map(math.isnan, differences)) else f"{max(differences):.1e}"


def _markdown(head: Sequence[str], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
