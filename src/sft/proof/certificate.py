"""How a certificate reads: as JSON with every cell, as a page, and as a table on the terminal."""

import io
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoConfig

from sft.proof.cells import NUM_STEPS, ROUNDINGS, CellResult, Key
from sft.proof.excerpt import Excerpt
from sft.proof.reference import Reference
from sft.runs import provenance
from sft.runs.files import write_json, write_text

HEAD = ("strategy", "ranks", "pass", "loss", "gradient", "weights", "tolerance", "seconds")


@dataclass(frozen=True)
class Certificate:
    """All results and the settings that they were made with."""

    config: DictConfig
    model: dict[str, Any]  # the small model's configuration
    excerpt: Excerpt
    references: dict[Key, Reference]
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

    def raised(self) -> str:
        """A paragraph of the tolerances that rounding raised."""
        tolerances = [result.tolerance for result in self.results if result.raised]
        if not tolerances:
            return ""
        return (
            f"The tolerance of {len(tolerances)} cell{'s' if len(tolerances) > 1 else ''} was raised, to at most "
            f"{max(tolerances):.0e}: {ROUNDINGS} times what moving each first weight to the next number above or "
            "below it does to the loop's own weights.\n\n"
        )

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "certificate.json", self.document())
        write_text(folder / "certificate.md", self.page())

    def document(self) -> dict[str, object]:
        largest = self.config.trainer.gradient_clip_val
        return {
            "passed": self.passed,
            "num_steps": NUM_STEPS,
            "device": self.config.device,
            "precision": self.config.precision,
            "references": [
                {
                    "optimizer": optimizer,
                    "packed": packed,
                    "variant": variant,
                    "losses": reference.losses,
                    "grad_norms": reference.grad_norms,
                    "num_clipped": sum(norm > largest for norm in reference.grad_norms),
                    "movement": reference.movement,
                    "change": reference.change,
                    "noise": reference.noise,
                    "rounding": reference.rounding,
                }
                for (optimizer, packed, variant), reference in self.references.items()
            ],
            "cells": [result.document() for result in self.results],
            "seconds": round(self.seconds, 1),
            "model": self.model,
            "settings": OmegaConf.to_container(self.config, resolve=True),
            "provenance": provenance.collect(),
        }

    def show(self, console: Console) -> None:
        """Prints the table, a line for each of the first cells that fail, and the verdict."""
        console.print(self.table())
        for line in self.failures()[:10]:
            console.print(line, style="red", markup=False)
        console.print(self.verdict, style="bold green" if self.passed else "bold red")

    def table(self, style: box.Box | None = None) -> Table:
        """A row for each strategy and number of ranks, with the largest differences of its cells."""
        # A log is 80 columns wide, and a name that is cut says nothing.
        table = Table(*(Column(name, no_wrap=True) for name in HEAD), box=style, padding=(0, 2, 0, 0))
        for (num_ranks, strategy), group in groupby(self.results, lambda result: result.cell.group):
            results = list(group)
            table.add_row(
                strategy,
                str(num_ranks),
                f"{sum(result.passed for result in results)}/{len(results)}",
                *(_largest([getattr(result, name) for result in results]) for name in ("loss", "grad_norm", "weight")),
                f"{max(result.tolerance for result in results):{'.0e' if results[0].cell.exact else 'g'}}",
                f"{sum(result.seconds for result in results):.0f}",
            )
        return table

    def page(self) -> str:
        text = io.StringIO()
        Console(file=text, width=1000).print(self.table(box.MARKDOWN))
        failures = "".join(f"- {line}\n" for line in self.failures())
        cell, about = self.results[0].cell, provenance.collect()
        model = AutoConfig.for_model(**self.model)  # by the names that all families have
        weights = "each weight" if cell.exact else "all weights, in multiples of what bf16 in the loop itself does,"
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        return f"""# Certificate {self.verdict}

Each cell is a fit by the code of `sft train`, compared with a plain PyTorch loop in fp32 that shares no code with it: \
the loss of each of {NUM_STEPS} steps (tolerance {cell.loss_tolerance:g}) and {weights} in the last checkpoint. A row \
shows the largest differences of its cells, which certificate.json lists.

{text.getvalue().strip()}

{self.raised()}{failures}
## What was trained

- model: `{model.model_type}` with {model.num_hidden_layers} layers of {model.hidden_size} channels and \
{model.vocab_size} tokens, random weights, dropout off
- on the {cell.device}, in {cell.precision}
- data: {len(self.excerpt)} samples, {self.excerpt.lengths.sum()} tokens
- gradients are clipped to a norm of {self.config.trainer.gradient_clip_val:.4g}
- made by `{" ".join(["sft", *about["command"][1:]])}` at {about["started"]} in {self.seconds:.0f} s; commit \
{about["commit"] or "unknown"}{" with changes" if about["uncommitted_diff"] else ""}; Python \
{about["python"]}, {versions}
"""


def _largest(differences: list[float]) -> str:
    """`none` if one is missing."""
    return "none" if any(map(math.isnan, differences)) else f"{max(differences):.1e}"
