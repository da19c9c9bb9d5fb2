"""How a certificate reads: as a table, as JSON, and as a page."""

import json
import math
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from sft.training import provenance
from sft.training.matrix import LOSS_TOLERANCE, NUM_STEPS, Result
from sft.training.reference import Reference
from sft.training.samples import Excerpt


@dataclass(frozen=True)
class Certificate:
    """All results, and what they were made with."""

    settings: dict[str, Any]
    excerpt: Excerpt
    references: dict[tuple[str, bool], Reference]
    results: list[Result]
    seconds: float

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)
    def save(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"certificate.json").write_text(json.dumps([r.document() for r in self.results], indent=1))
    def table(self):
        out=[]
        for r in self.results: out.append(f"{r.cell} {r.loss:.1e} {r.grad_norm:.1e} {r.weight:.1e} {r.seconds:.1f} {r.passed} {r.error}")
        for k, r in self.references.items(): out.append(f"{k} {r.losses[0]:.3f} {r.losses[-1]:.3f} move {r.movement:.3g} norms {[round(n,2) for n in r.grad_norms]} clip {self.settings['trainer']['gradient_clip_val']:.3g}")
        return "\n".join(out)
