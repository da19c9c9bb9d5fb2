"""The certificate's cells on one device, and the faults that it must find there (tests/faults.py)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from checks.process import Failed, Place, context
from sft.proof.cells import Cell, CellResult


def composed(place: Place, precision: str, *overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    from sft.config import CONF
    from sft.training.prepare import quiet

    quiet()
    device = "gpu" if place.gpu else "cpu"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("certify", [f"precision={precision}", f"device={device}", *overrides])


def certify(place: Place, precision: str, strategies: list[str]) -> tuple[str, dict[str, Any]]:
    """Resumed or not, packed or not, SGD or AdamW, on one rank."""
    from sft.commands import certify as command
    from sft.proof.cells import all_cells
    from sft.proof.rank_pool import seeing

    device = "gpu" if place.gpu else "cpu"
    folder = place.folder / f"certificate-{precision}-{'-'.join(strategies)}"
    folder.mkdir()
    chosen = [cell for cell in all_cells(True, precision, device, max_ranks=1) if cell.strategy in strategies]
    if not place.gpu:  # the whole of them is sft certify's own test
        chosen = [cell for cell in chosen if cell.packed]
    with seeing(device), forking():
        certificate = command.certify(composed(place, precision), folder, chosen)
    figures = {str(each.cell): each.document() for each in certificate.results}
    if not certificate.passed:
        raise Failed(f"{certificate.verdict}: {'; '.join(certificate.failures()[:3])}")
    worst = {name: max(getattr(each, name) for each in certificate.results) for name in ("loss", "weight")}
    limit = certificate.results[0].cell
    return (
        f"{len(chosen)} cells: loss within {worst['loss']:.1e} ({limit.loss_tolerance:.0e}), weights within "
        f"{worst['weight']:.1e} ({limit.tolerance:.0e})",
        figures,
    )


def faults(place: Place, precision: str) -> tuple[str, dict[str, Any]]:
    """Each fault that can show on one rank fails its cells and no others."""
    from faults import FAULTS
    from sft.commands.certify import make_references, prepare
    from sft.proof.rank_pool import seeing

    device = "gpu" if place.gpu else "cpu"
    folder = place.folder / f"faults-{precision}"
    folder.mkdir()
    table = {}
    for fault, cells in FAULTS.items():
        own = [[replace(cell, precision=precision, device=device) for cell in each if possible(cell)] for each in cells]
        if own[0]:
            table[fault] = own[0][:1], own[1][:1]
    if not place.gpu:  # the whole of them are tests of sft certify
        table = dict(list(table.items())[:1])
    missed, figures = [], {}
    with seeing(device), forking():
        config, excerpt = prepare(composed(place, precision), folder)
        used = {cell for cells in table.values() for each in cells for cell in each}
        keys = sorted({cell.key for cell in used})
        references, config.trainer.gradient_clip_val = make_references(config, folder, excerpt, keys)
        for fault, (failing, passing) in table.items():
            begun = time.monotonic()
            results = under(fault, config, folder, excerpt, [*failing, *passing], references)
            missed += [f"{fault.__name__} passes {cell}" for cell in failing if results[cell].passed]
            missed += [f"{fault.__name__} fails {cell}" for cell in passing if not results[cell].passed]
            # What raises shows nothing of the fault.
            missed += [
                f"{fault.__name__} in {cell}: {result.error}" for cell, result in results.items() if result.error
            ]
            figures[fault.__name__] = {str(cell): result.document() for cell, result in results.items()}
            print(f"{fault.__name__}: {time.monotonic() - begun:.1f} s", flush=True)
    if missed:
        raise Failed("; ".join(missed[:3]))
    return f"planted faults found in {precision}: {len(table)} of {len(table)}", figures


@contextmanager
def forking() -> Iterator[None]:
    """Ranks are forked from this process, which has imported all and not touched CUDA, instead of from a new server."""
    import torch

    from sft.proof import rank_pool

    # transformers asks it in each forward pass, and that touches CUDA.
    torch.cuda.is_current_stream_capturing = lambda: False
    server, rank_pool.PROCESSES = rank_pool.PROCESSES, context()
    try:
        yield
    finally:
        rank_pool.PROCESSES = server


def possible(cell: Cell) -> bool:
    """Whether it can be made on one device with what is installed."""
    return cell.num_ranks == 1 and (not cell.strategy.startswith("deepspeed") or find_spec("deepspeed") is not None)


def under(
    fault: Any, config: Any, folder: Path, excerpt: Any, cells: list[Cell], references: Any
) -> dict[Cell, CellResult]:
    from sft.commands.certify import run_group

    # A resumed cell needs the one that it resumes.
    wanted = [pair for cell in cells for pair in ([replace(cell, resumed=False), cell] if cell.resumed else [cell])]
    results = run_group(config, folder, excerpt, list(dict.fromkeys(wanted)), references, fault)
    return {result.cell: result for result in results if result.cell in cells}
