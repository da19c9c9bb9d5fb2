"""What tests compare of a run's folder."""

import csv
from pathlib import Path
from typing import Any

import torch

from sft.checkpoint.checkpoint import Checkpoint, complete
from sft.runs import manifest
from sft.runs.metric import timings

ANSWER: dict[str, Any] = {  # a line of samples.jsonl
    **{"step": 2, "number": 0, "source": "rows", "row": 1, "prompt": "p", "reference": "r", "base": None},
    **{"answer": "a", "score": 0.5, "base_score": None, "num_tokens": 1, "num_reference_tokens": 1, "stopped": True},
}


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv, without what depends on the machine."""
    with (folder / "metrics.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        of_machine = timings(reader.fieldnames or ())
        return [{k: v for k, v in row.items() if k not in of_machine} for row in reader]


def last_checkpoint(folder: Path) -> Checkpoint:
    return complete(folder / "checkpoints")[-1]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the last checkpoint."""
    last = last_checkpoint(folder)
    return {name: last.tensor(name) for name in last.shapes}


def final_files(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's step, weights, optimizer state and probes, and the exported weights."""
    last = last_checkpoint(folder).path
    return {
        "step": last.name.encode(),
        **{path.name: path.read_bytes() for path in last.glob("*.safetensors")},
        "probes": (last / "probes.json").read_bytes(),
        **{f"export/{path.name}": path.read_bytes() for path in folder.glob("export/*.safetensors")},
    }


def change(file: Path, **changes: object) -> None:
    """Rewrites a JSON file of a run as the run itself would, without the keys whose value is None."""
    value = manifest.read_sealed(file, "") | changes
    manifest.write_sealed(file, {key: kept for key, kept in value.items() if kept is not None})
