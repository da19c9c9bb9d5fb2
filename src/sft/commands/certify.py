"""sft certify: prove that every way of training gives the numbers of a plain PyTorch loop.

  sft certify
      on a made-up model and made-up samples
  sft certify model.path=Qwen/Qwen3-0.6B data.path=my.jsonl
      on a small model of the same architecture and the first rows of the data; takes all settings of sft train
  sft certify quick=true
      fewer cells: every strategy on 2 ranks
  sft certify precision=bf16-mixed device=gpu
      in bf16 (the loop stays in fp32), and on this machine's GPUs instead of its processor

Cells: strategy x ranks x accumulation x packed or not x uninterrupted or resumed x SGD or AdamW, and for each strategy
and number of ranks one each whose tokens have weights, whose parameters are frozen and grouped by patterns, with
NEFTune, label smoothing and z-loss and, of a mixture of experts, with a load-balancing loss, and two with an average of
the weights, which is compared as they are. Each cell is a fit by the code of sft train in processes of this machine. It
is compared with a loop that shares no code with it: the loss of
every step, and the weights after the last one. The certificate is certificates/NAME/certificate.json and .md. The exit
code is 0 only if every cell passes.
"""

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from sft.config.literal import instantiate, resolved
from sft.errors import UserError
from sft.model.model_class import of_folder
from sft.model.router import has_loss
from sft.proof import cells as matrix
from sft.proof import reference
from sft.proof.cells import GLOBAL_BATCH_SIZE, NUM_STEPS, RESUME_AT, Cell, CellResult, Key, compare, run_cell
from sft.proof.certificate import Certificate
from sft.proof.excerpt import Excerpt, excerpt, made_up
from sft.proof.rank_pool import Pool, RankError, seeing, share_out
from sft.proof.reference import Reference
from sft.proof.shrink import first_rows, shrink
from sft.runs.identity import identity
from sft.training.prepare import quiet, setup

NUM_ROWS = 2000  # of the data, of which a few samples are taken
# The configuration of a made-up Llama.
MADE_UP = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True}


def main(config: DictConfig) -> None:
    quiet()
    max_ranks = check(config)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    kinds = {"quick": config.quick, config.precision: config.precision != "32-true", "gpu": config.device == "gpu"}
    kind = "".join(f"-{name}" for name, true in kinds.items() if true)
    output = Path(config.output or f"certificates/{config.name}-{identity(settings)}{kind}")
    with seeing(config.device), tempfile.TemporaryDirectory(prefix="sft-certify-") as folder:
        certificate = certify(config, Path(folder), max_ranks=max_ranks)
    certificate.save(output)
    certificate.show(Console())
    print(f"certificate: {output}/certificate.md", flush=True)
    if not certificate.passed:
        raise SystemExit(1)


def check(config: DictConfig) -> int:
    """The largest number of ranks; refuses a device that isn't there."""
    if config.device == "cpu":
        return 4
    if not (num_gpus := torch.cuda.device_count()):
        raise UserError("device=gpu: this process sees no CUDA device (nvidia-smi): set device=cpu")
    return num_gpus


def certify(
    config: DictConfig,
    folder: Path,
    cells: list[Cell] | None = None,
    before: Callable[[], None] | None = None,
    max_ranks: int = 4,
) -> Certificate:
    """Runs the cells in `folder`, by default all of the model; `before` is called in each rank's process first."""
    started = time.monotonic()
    config, samples = prepare(config, folder)
    if cells is None:
        cells = matrix.all_cells(config.quick, config.precision, config.device, max_ranks)
        if has_loss(of_folder(str(folder / "model")).from_pretrained(folder / "model")):
            cells = matrix.with_experts(cells, config.quick)
    keys = sorted({cell.key for cell in cells})
    references, config.trainer.gradient_clip_val = make_references(config, folder, samples, keys)
    results: list[CellResult] = []
    for (num_ranks, strategy), group in groupby(cells, lambda cell: cell.group):
        begun = time.monotonic()
        of_group = run_group(config, folder, samples, list(group), references, before)
        if doubtful := sorted({result.cell.key for result in of_group if result.may_be_rounding}):
            references |= with_rounding(config, folder, samples, {key: references[key] for key in doubtful})
            measured = {key: references[key].rounding for key in doubtful}
            of_group = [replace(result, rounding=measured.get(result.cell.key, result.rounding)) for result in of_group]
        results += of_group
        num_passed = sum(result.passed for result in of_group)
        print(
            f"{strategy}, {num_ranks} rank{'s' if num_ranks > 1 else ''}: {num_passed} of {len(of_group)} pass "
            f"({time.monotonic() - begun:.0f} s)",
            flush=True,
        )
    model = json.loads((folder / "model" / "config.json").read_text())
    return Certificate(config, model, samples, references, results, time.monotonic() - started)


def prepare(config: DictConfig, folder: Path) -> tuple[DictConfig, Excerpt]:
    """Writes the small model into `folder`; returns the configuration and the samples of all cells."""
    config = resolved(config)
    if config.data.path:
        read = copy.deepcopy(config)
        read.data.val_path, read.data.val_split, read.data.val_size = None, None, 0
        OmegaConf.update(read, "evaluation.text", None)
        first_rows(read.data, NUM_ROWS)
        train = setup(read).splits.train
        samples = excerpt(train, train.lengths, GLOBAL_BATCH_SIZE)
    else:
        samples = made_up(config.seed, GLOBAL_BATCH_SIZE)
    if not (config.model.path or config.model.tokenizer):
        config.model.init, config.model.tokenizer = "random", "none"  # made-up samples need none
        if "model_type" not in config.model.config:
            config.model.config = {**MADE_UP, **config.model.config}
    shrink(config, folder, config.device, config.precision, samples.vocab_size)
    config.callbacks, config.logger = None, None
    # What its cells are about.
    config.parameters, config.loss, config.averaging = {}, {}, None
    config.model.neftune_alpha, config.trainer.gradient_clip_algorithm = 0.0, "norm"
    config.val_every, config.checkpoint = None, {"save_every": RESUME_AT, "keep_last": 2, "export": "last"}
    return config, samples


def make_references(
    config: DictConfig, folder: Path, samples: Excerpt, keys: list[Key]
) -> tuple[dict[Key, Reference], float]:
    """The plain loop for each of `keys`, and the norm that gradients are clipped to in all of them."""
    run = plain_loop(config, folder, samples)

    def in_precision(pool: Pool, key: Key) -> Reference:
        exact = run(pool, key, clip)
        return exact if config.trainer.precision == "32-true" else exact.with_noise(run(pool, key, clip, rounded=True))

    with reference_pools(config, folder) as pools:
        # The median norm of the first steps, so that some steps are clipped and some are not.
        clip = float(np.median(run(pools[0], ("sgd", False, ""), float("inf"), num_steps=8).grad_norms))
        references = share_out(pools, keys, in_precision)
    return dict(zip(keys, references, strict=True)), clip


def with_rounding(
    config: DictConfig, folder: Path, samples: Excerpt, references: dict[Key, Reference]
) -> dict[Key, Reference]:
    """The references with their rounding measured, by a second loop each."""
    run = plain_loop(config, folder, samples)

    def measured(pool: Pool, key: Key) -> Reference:
        return references[key].with_rounding(run(pool, key, config.trainer.gradient_clip_val, moved=True))

    with reference_pools(config, folder) as pools:
        return dict(zip(references, share_out(pools, list(references), measured), strict=True))


def plain_loop(config: DictConfig, folder: Path, samples: Excerpt) -> Callable[..., Reference]:
    """The loop of the model in `folder`, as a function of pool, key, norm to clip to and number of steps."""
    schedule = instantiate(config.schedule)
    adapter = instantiate(config.adapter, _convert_="all") or None
    lora = adapter.lora_config() if adapter else None
    steps = {packed: matrix.steps(samples, packed, config.seed) for packed in (True, False)}
    if not all(reference.check_order(order, len(samples)) for order in steps.values()):
        raise AssertionError("the step plan takes a sample twice in an epoch, or leaves one out")

    def run(
        pool: Pool, key: Key, clip: float, num_steps: int = NUM_STEPS, rounded: bool = False, moved: bool = False
    ) -> Reference:
        optimizer, packed, variant = key
        of_cell = matrix.samples_of(samples, variant, config.seed)
        in_steps = [[of_cell.weighted_sample(index) for index in step] for step in steps[packed][:num_steps]]
        make_optimizer = instantiate(config.optimizers[optimizer], _convert_="all")
        arguments = (folder / "model", in_steps, make_optimizer, schedule, clip, lora, config.seed)
        different = matrix.settings_of(variant, adapter=lora is not None)
        return pool(reference.train, *arguments, different, steps[packed], rounded, moved, timeout=600)

    return run


@contextmanager
def reference_pools(config: DictConfig, folder: Path) -> Iterator[list[Pool]]:
    """Processes for the plain loop. UserError where it fails in one."""
    pools = [Pool(1, folder / f"reference-{number}", config.device) for number in range(min(4, num_cores()))]
    try:
        yield pools
    except RankError as error:
        raise UserError(f"the plain loop can't train this model ({error}): name another with model.path") from error
    finally:
        for pool in pools:
            pool.stop()


def run_group(
    config: DictConfig,
    folder: Path,
    samples: Excerpt,
    cells: list[Cell],
    references: dict[Key, Reference],
    before: Callable[[], None] | None,
) -> list[CellResult]:
    """The cells of one strategy and number of ranks, in several process groups at once."""

    def run_pair(pool: Pool, pair: list[Cell]) -> list[CellResult]:
        results = []
        for cell in pair:
            begun = time.monotonic()
            try:
                outcome = pool(run_cell, config, folder, samples, cell, timeout=config.cell_timeout)
                result = compare(cell, outcome, references[cell.key])
            except (RankError, OSError) as error:
                result = CellResult(cell, error=str(error))
            results.append(replace(result, seconds=time.monotonic() - begun))
        for cell in pair:
            shutil.rmtree(folder / str(cell), ignore_errors=True)
        return results

    # A resumed fit starts from a checkpoint of the uninterrupted one before it.
    pairs = [list(pair) for _, pair in groupby(cells, lambda cell: replace(cell, resumed=False))]
    # At least two pools: while the ranks of one wait for each other, those of the other work.
    num_ranks = cells[0].num_ranks
    num_pools = min(len(pairs), max(2, num_cores() // num_ranks))
    pools = [Pool(num_ranks, folder / f"ranks-{number}", cells[0].device, before) for number in range(num_pools)]
    try:
        return [result for results in share_out(pools, pairs, run_pair) for result in results]
    finally:
        for pool in pools:
            pool.stop()


def num_cores() -> int:
    return len(os.sched_getaffinity(0))
