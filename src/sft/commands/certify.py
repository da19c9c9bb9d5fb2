"""sft certify: prove that every way of training makes the numbers of a plain PyTorch loop.

  sft certify
      on a made-up model and made-up samples
  sft certify model.path=Qwen/Qwen3-0.6B data.path=my.jsonl
      on the same architecture, small, and the first rows of the data; all settings of sft train
  sft certify quick=true
      fewer cells: every strategy, 1 and 2 ranks
  sft certify precision=bf16-mixed device=gpu
      in bf16 (the loop stays in fp32), and on this machine's GPUs instead of its processor

Cells: strategy x ranks x accumulation x packed or not x uninterrupted or resumed x SGD or AdamW. Each is a fit by
the code of sft train in processes of this machine, and is compared with a loop that shares no code with
it: the loss of every step, and the weights after the last. The certificate is certificates/NAME/certificate.json and
.md; the exit code is 0 only where every cell passes.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from sft.errors import UserError

if TYPE_CHECKING:
    from sft.proof.cells import Cell, Result
    from sft.proof.certificate import Certificate
    from sft.proof.excerpt import Excerpt
    from sft.proof.reference import Reference

Key = tuple[str, bool]  # optimizer, packed: what a reference depends on


def main(config: Any) -> None:
    from rich.console import Console

    from sft.proof.cells import all_cells
    from sft.proof.rank_pool import seeing
    from sft.runs.run import identity
    from sft.training.prepare import quiet

    quiet()
    most_ranks = check(config)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    kinds = {"quick": config.quick, config.precision: config.precision != "32-true", "gpu": config.device == "gpu"}
    kind = "".join(f"-{name}" for name, true in kinds.items() if true)
    output = Path(config.output or f"certificates/{config.name}-{identity(settings)}{kind}")
    chosen = all_cells(config.quick, config.precision, config.device, most_ranks)
    with seeing(config.device), tempfile.TemporaryDirectory(prefix="sft-certify-") as folder:
        certificate = certify(config, Path(folder), chosen)
    certificate.save(output)
    Console().print(certificate.table(), markup=False)
    print(f"certificate: {output}/certificate.md", flush=True)
    if not certificate.passed:
        raise SystemExit(1)


def check(config: Any) -> int:
    """Refuses a device or precision that can't be; the number of ranks that there can be."""
    if config.precision not in ("32-true", "bf16-mixed"):
        raise UserError(f"precision={config.precision}: a certificate is made in 32-true or bf16-mixed")
    if config.device not in ("cpu", "gpu"):
        raise UserError(f"device={config.device} is unknown: set cpu or gpu")
    if config.device == "cpu":
        return 4
    import torch

    if not (num_gpus := torch.cuda.device_count()):
        raise UserError("device=gpu: this process sees no CUDA device (nvidia-smi): set device=cpu")
    return num_gpus


def certify(config: Any, folder: Path, cells: "list[Cell]", before: Callable[[], None] | None = None) -> "Certificate":
    """Runs the cells in `folder` and returns their `Certificate`; `before` is called in each rank's process first."""
    from sft.proof.certificate import Certificate

    started = time.monotonic()
    config, excerpt = prepare(config, folder)
    keys = sorted({(cell.optimizer, cell.packed) for cell in cells})
    references, clip = make_references(config, folder, excerpt, keys)
    config.trainer.gradient_clip_val = clip
    settings: Any = OmegaConf.to_container(config, resolve=True)
    results: list[Result] = []
    for (num_ranks, strategy), group in groupby(cells, lambda cell: cell.group):
        begun = time.monotonic()
        made = run_group(settings, folder, num_ranks, list(group), references, config.cell_timeout, before)
        results += made
        passed = sum(result.passed for result in made)
        print(
            f"{strategy}, {num_ranks} rank{'s' if num_ranks > 1 else ''}: {passed} of {len(made)} pass "
            f"({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
    model = json.loads((folder / "model" / "config.json").read_text())
    return Certificate(settings, model, excerpt, references, results, time.monotonic() - started)


def prepare(config: Any, folder: Path) -> "tuple[Any, Excerpt]":
    """Writes the small model and the samples into `folder`; returns the configuration of all cells."""
    from sft.proof.cells import GLOBAL_BATCH_SIZE, RESUME_AT
    from sft.proof.excerpt import excerpt, made_up
    from sft.proof.shrink import first_rows, on_device, shrink, write_model
    from sft.training.prepare import setup

    config = config.copy()
    OmegaConf.set_struct(config, False)
    model_named = config.model.path or config.model.tokenizer
    if config.data.path:
        read = config.copy()
        first_rows(read.data)
        read.data.val_path, read.data.val_split, read.data.val_size = None, None, 0
        train = setup(read).splits.train
        samples = excerpt(train, train.lengths, GLOBAL_BATCH_SIZE)
    else:
        samples = made_up(config.seed, GLOBAL_BATCH_SIZE)
    if model_named:
        config = shrink(config, folder, samples.vocab_size)
    else:
        from transformers import LlamaConfig

        llama = LlamaConfig(num_attention_heads=9, num_key_value_heads=3, hidden_size=72, tie_word_embeddings=True)
        write_model(folder / "model", llama, samples.vocab_size, config.seed)
        config.model.path = str(folder / "model")
    on_device(config, config.device, config.precision)
    samples.save(folder / "samples.npz")
    config.callbacks, config.logger = None, None
    config.val_every, config.checkpoint = None, {"save_every": RESUME_AT, "keep_last": 2}
    return config, samples


def make_references(
    config: Any, folder: Path, excerpt: "Excerpt", keys: list[Key]
) -> "tuple[dict[Key, Reference], float]":
    """The plain loop for each of `keys`, and the norm that gradients are clipped to in all of them."""
    import numpy as np
    from hydra.utils import instantiate

    from sft.proof import reference
    from sft.proof.cells import GLOBAL_BATCH_SIZE, NUM_STEPS
    from sft.proof.rank_pool import Pool, RankError

    schedule = instantiate(config.schedule)
    adapter = instantiate(config.adapter, _convert_="all") or None
    lora = adapter.lora_config() if adapter else None
    steps = {packed: excerpt.steps(NUM_STEPS, GLOBAL_BATCH_SIZE, packed, config.seed) for packed in (True, False)}
    if not all(reference.check_order(each, len(excerpt)) for each in steps.values()):
        raise AssertionError("the step plan takes a sample twice in an epoch, or leaves one out")

    def work(pool: Pool, key: Key, clip: float, num_steps: int = NUM_STEPS) -> "Reference":
        optimizer, packed = key
        samples = [[excerpt[index] for index in step] for step in steps[packed][:num_steps]]
        make_optimizer = instantiate(config.optimizers[optimizer], _convert_="all")
        arguments = (folder / "model", samples, make_optimizer, schedule, clip, lora, config.seed)
        return pool(reference.train, *arguments, timeout=600)

    pools = [Pool(1, folder / f"reference-{number}", config.device) for number in range(min(4, num_cores()))]
    try:
        # Between those of the first steps, so that some are clipped and some are not.
        clip = float(np.median(work(pools[0], ("sgd", False), float("inf"), num_steps=8).grad_norms))
        made = share_out(pools, keys, lambda pool, key: work(pool, key, clip))
    except RankError as error:
        raise UserError(f"the plain loop can't train this model ({error}): name another with model.path") from error
    finally:
        for pool in pools:
            pool.stop()
    return dict(zip(keys, made, strict=True)), clip


def run_group(
    settings: dict[str, Any],
    folder: Path,
    num_ranks: int,
    cells: "list[Cell]",
    references: "dict[Key, Reference]",
    timeout: float,
    before: Callable[[], None] | None,
) -> "list[Result]":
    """The cells of one strategy on so many ranks, in several process groups at once."""
    from sft.proof.cells import Result, compare, run_cell
    from sft.proof.rank_pool import Pool, RankError

    def work(pool: Pool, pair: "list[Cell]") -> "list[Result]":
        made = []
        for cell in pair:
            begun = time.monotonic()
            try:
                outcome = pool(run_cell, settings, folder, cell, timeout=timeout)
                result = compare(cell, outcome, references[cell.optimizer, cell.packed])
            except (RankError, OSError) as error:
                result = Result(cell, error=str(error))
            made.append(replace(result, seconds=time.monotonic() - begun))
        for cell in pair:
            shutil.rmtree(folder / str(cell), ignore_errors=True)
        return made

    # A resumed fit goes on from a checkpoint of the uninterrupted one before it.
    pairs = [list(pair) for _, pair in groupby(cells, lambda cell: replace(cell, resumed=False))]
    # At least two: while the ranks of one wait for each other, those of the other work.
    num_pools = min(len(pairs), max(2, num_cores() // num_ranks))
    pools = [Pool(num_ranks, folder / f"ranks-{number}", cells[0].device, before) for number in range(num_pools)]
    try:
        return [result for made in share_out(pools, pairs, work) for result in made]
    finally:
        for pool in pools:
            pool.stop()


def share_out(pools: list[Any], tasks: list[Any], work: Callable[[Any, Any], Any]) -> list[Any]:
    """`work(pool, task)` of each task, in the order of the tasks; each pool does one at a time."""
    from concurrent.futures import ThreadPoolExecutor
    from queue import SimpleQueue

    idle: SimpleQueue[Any] = SimpleQueue()
    for pool in pools:
        idle.put(pool)

    def one(task: Any) -> Any:
        pool = idle.get()
        try:
            return work(pool, task)
        finally:
            idle.put(pool)

    threads = ThreadPoolExecutor(len(pools))
    try:
        return list(threads.map(one, tasks))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # interrupted, what hasn't begun doesn't


def num_cores() -> int:
    return len(os.sched_getaffinity(0))
