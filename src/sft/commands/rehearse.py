"""sft rehearse: run a small form of a job through all its stages before it is queued. Settings as for sft train.

  sft rehearse experiment=gsm8k strategy=deepspeed_zero3 trainer=gpu trainer.num_nodes=4 trainer.devices=8
      takes about a minute on 2 ranks of this machine's processor; exit code 0 if every stage passed, 2 for a mistake
      in the settings, 1 for a failure

First the settings are checked against each other, with the real number of ranks. Then sft train runs with a few narrow
layers of the same architecture and the first rows of the data: it proves its first batch, trains, validates, saves,
stops on SIGUSR1, resumes. Then sft export, which reloads the exported model, and sft generate. All files go to a
temporary folder, which is kept if a stage fails.
"""

import copy
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sft.commands.export import try_export
from sft.config.literal import escaped, resolved
from sft.data.chat_template import special_ids
from sft.data.labels import IGNORE
from sft.errors import UserError
from sft.proof.rehearsal import Failed, Mistaken, run_command
from sft.proof.shrink import first_rows, shrink
from sft.runs.files import check_writable
from sft.runs.run import Run
from sft.runs.signals import EXIT_CODE
from sft.training import extension
from sft.training.compilation import compile_optimizer, offloads
from sft.training.prepare import Prepared, quiet, setup
from sft.training.settings import check

NUM_RANKS = 2
NUM_STEPS = 4
SAVE_EVERY = 2  # steps; validates as often
SIGNAL_AT = 3  # the step in which SIGUSR1 comes
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # that a processor has


def main(config: DictConfig) -> None:
    quiet()
    folder = Path(tempfile.mkdtemp(prefix="sft-rehearsal-"))
    config = resolved(config)
    options = config.pop("rehearse")
    stages = Stages(folder, options.timeout)
    try:
        stages.end(_check(config, folder, options.num_rows))
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, UserError):
            raise UserError(f"check failed: {error}") from error
        raise
    if offloads(config):  # outside the stages' time limit
        stages.begin("compile")
        compile_optimizer(partial(print, flush=True))
        stages.end("DeepSpeed's AdamW for the host")
    try:
        _rehearse(stages)
    except Failed as failed:
        message = f"{stages.name} failed: {failed}; see {stages.log}"
        if isinstance(failed, Mistaken):
            raise UserError(message) from failed
        print(f"sft: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    shutil.rmtree(folder)
    print(f"rehearsed in {time.monotonic() - stages.start:.0f} s: queue sft train with the same settings")


class Stages:
    """Runs commands in `folder`, and prints each stage with its time as it ends."""

    def __init__(self, folder: Path, timeout: float) -> None:
        self.folder, self.timeout = folder, timeout
        self.log = folder
        self.lines: list[str] = []  # that the last command printed
        self.start = time.monotonic()
        self.begin("check")

    def begin(self, name: str) -> None:
        self.name, self.begun = name, time.monotonic()

    def end(self, summary: str, then: str = "") -> None:
        print(f"  {self.name:<9}{time.monotonic() - self.begun:>6.1f} s  {summary}", flush=True)
        self.begin(then)

    def run(
        self, stage: str, arguments: list[str], on_line: Callable[[str], None] | None = None, exit_code: int = 0
    ) -> None:
        """Runs `sft ARGUMENTS` in its own process."""
        self.begin(stage)
        self.log = self.folder / f"{stage}.log"
        self.lines.clear()
        run_command(arguments, self.log, on_line or self.lines.append, self.timeout, exit_code)

    def printed(self, pattern: str) -> str:
        """The last match among the lines that the command printed."""
        for line in reversed(self.lines):
            if match := re.search(pattern, line):
                return match[0]
        raise Failed(f"it has not printed a line like {pattern!r}")


def _check(config: DictConfig, folder: Path, num_rows: int) -> str:
    """Checks the settings, then writes those of the small job: `folder/conf/rehearsed.yaml`."""
    num_ranks, accumulation = check(config, here=False)
    extension.settle(config)
    small = copy.deepcopy(config)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    run = Run.of(settings)
    check_writable(Path(config.data.cache_dir), "data.cache_dir")
    cut_data(small.data, folder, num_rows)
    prepared = setup(small, run=run, weights="here")
    stops = check_stops(prepared)
    if config.export:
        try_export(prepared)
    shrink_job(small, prepared, folder)
    (folder / "conf").mkdir()
    shrunk: Any = OmegaConf.to_container(small, resolve=True)
    OmegaConf.save({"defaults": ["quiet", "_self_"], **escaped(shrunk)}, folder / "conf" / "rehearsed.yaml")
    sources = [source for split in prepared.splits.ledger.values() for source in split.get("sources", [])]
    num_read, num_lost = sum(source["rows"] for source in sources), sum(source["rows_lost"] for source in sources)
    return (
        f"{run.folder} ({run.status.get('state', 'new')}): {num_ranks} ranks × {accumulation} micro-batches of "
        f"{config.micro_batch_size}; of the first {num_read} rows {num_lost} are lost; "
        f"{len(prepared.splits.train)} samples end in {stops}"
    )


def check_stops(prepared: Prepared) -> str:
    """The tokens at which the exported model will stop; refuses samples that don't teach it to."""
    tokenizer, train = prepared.tokenizer, prepared.splits.train
    stops = [token for token in prepared.stop_token_ids if token in special_ids(tokenizer)]
    for index in range(min(len(train), 1000)):
        input_ids, labels = train[index]
        last = int(labels[labels != IGNORE][-1])
        if last not in stops or labels[-1] == IGNORE:
            end = tokenizer.decode(input_ids[-1:].tolist())
            raise UserError(
                f"{train.source(index)} row {train.row(index)}: the last supervised token is "
                f"{tokenizer.decode([last])!r} and the sample ends in {end!r}, so the model would not learn to stop: "
                "give a template that ends a response in a special token in model.chat_template"
            )
    return " or ".join(str(tokenizer.decode(token)) for token in stops)


def cut_data(data: DictConfig, folder: Path, num_rows: int) -> None:
    """Leaves the first rows, in a cache of their own, however many of them are lost."""
    first_rows(data, num_rows)
    data.cache_dir, data.max_lost = str(folder / "cache"), 1.0
    if data.val_size:  # a share of few rows may be none, a number of rows may be all
        data.val_size = max(data.val_size, 0.1) if data.val_size < 1 else min(data.val_size, num_rows // 10)


def shrink_job(config: DictConfig, prepared: Prepared, folder: Path) -> None:
    """Turns a configuration into that of a run of seconds on this machine's processor."""
    precision = config.trainer.precision
    shrink(config, folder, "cpu", precision if precision in PRECISIONS else "32-true")
    config.model.template = prepared.template
    splits = prepared.splits
    config.data.max_length = int(max(split.lengths.max() for split in (splits.train, splits.val) if split))
    config.trainer.devices = NUM_RANKS if config.strategy else 1
    if config.strategy:
        config.strategy.pop("process_group_backend", None)
    config.micro_batch_size, config.global_batch_size = 1, config.trainer.devices * 2
    config.epochs = config.max_steps = NUM_STEPS
    config.max_time, config.extend.run = None, None
    config.evaluation.kl_tokens, config.evaluation.text = 0, None
    config.evaluation.samples, config.evaluation.max_new_tokens = min(2, config.evaluation.samples), 8
    config.val_every = config.checkpoint.save_every = SAVE_EVERY
    config.callbacks = {
        **(config.callbacks or {}),
        "rehearsal": {"_target_": "sft.proof.rehearsal.SignalInStep", "step": SIGNAL_AT},
    }
    config.runs_dir, config.run, config.export = str(folder / "runs"), "rehearsal", False


def _rehearse(stages: Stages) -> None:
    def on_line(line: str) -> None:
        """Begins and ends the stages of training as its lines come."""
        stages.lines.append(line)
        if stages.name == "train" and line.startswith("first batch: "):
            stages.name = "proof"
            stages.end(line.removeprefix("first batch: "), then="train")
        if stages.name == "train" and re.match("step +1/", line):
            validates = any(line.startswith("step 0: validation") for line in stages.lines)
            stages.end(stages.printed(r"loss [\w.]+"), then="validate" if validates else "save")
        elif stages.name == "validate" and line.startswith(f"step {SAVE_EVERY}: validation"):
            stages.end(stages.printed(r"validation loss [\w.]+"), then="save")
        elif stages.name == "save" and line.startswith(f"step {SAVE_EVERY}: saved"):
            stages.end(f"step {SAVE_EVERY}", then="SIGUSR1")

    train = ["train", "--config-dir", str(stages.folder / "conf"), "--config-name", "rehearsed"]
    run = ["run=rehearsal", f"runs_dir={stages.folder / 'runs'}"]
    stages.run("train", train, on_line, EXIT_CODE)
    stages.end(stages.printed("stopped by SIGUSR1 after step .*"))
    stages.run("resume", train)
    stages.end(f"{stages.printed('resumed after step .*')}, finished{stages.printed(' after .* steps')}")
    stages.run("export", ["export", *run])
    stages.end(stages.printed("the log-probabilities of .*"))
    stages.run("generate", ["generate", *run, "--prompt", "Hello", "max_new_tokens=8"])
    stages.end("a prompt is answered")
