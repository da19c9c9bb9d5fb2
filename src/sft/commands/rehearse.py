"""sft rehearse: run a small form of a job through all its stages before it is queued. Settings as for sft train.

  sft rehearse experiment=gsm8k strategy=deepspeed_zero3 trainer=gpu trainer.num_nodes=4 trainer.devices=8
      about a minute, on 2 ranks of this machine's processor; exit code 0 where every stage went through, 2 for a
      mistake in the settings, 1 for a failure

The stages: the settings against each other, with the real number of ranks; then sft train on a model of the same
architecture with a few narrow layers, and the first rows of the data: train, validate, save, stop on SIGUSR1, resume;
sft export, which loads the exported model again; sft generate. What is written goes to a temporary folder, which stays
where something failed.
"""

import copy
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.errors import UserError
from sft.runs.run import Run

NUM_RANKS = 2
STEPS, SAVED, SIGNALLED = 4, 2, 3  # of the rehearsed run; validated and saved each SAVED, SIGUSR1 in step SIGNALLED
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")  # that a processor has


def main(config: Any) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, which others import, looks for one and says so
    from sft.proof import rehearsal
    from sft.training.prepare import quiet

    quiet()
    folder = Path(tempfile.mkdtemp(prefix="sft-rehearsal-"))
    stages = Stages(folder)
    options = config.rehearse
    # Resolved: where the small run lies must not change what refers to where the real one does.
    plain: Any = OmegaConf.to_container(config, resolve=True)
    config = OmegaConf.create({name: value for name, value in plain.items() if name != "rehearse"})
    stages.begin("check")
    try:
        stages.end(_check(config, folder, options.num_rows))
    except BaseException as error:
        shutil.rmtree(folder)
        if isinstance(error, UserError):
            raise UserError(f"check failed: {error}") from error
        raise
    try:
        _rehearse(folder, stages, options.timeout)
    except rehearsal.Failed as failed:
        message = f"{stages.name} failed: {failed}; see {stages.log}"
        if failed.users:
            raise UserError(message) from failed
        print(f"sft: {message}", file=sys.stderr, flush=True)
        sys.exit(1)
    shutil.rmtree(folder)
    print(f"rehearsed in {time.monotonic() - stages.start:.0f} s: queue sft train with the same settings")


class Stages:
    """Prints each stage with its time as it ends."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name, self.log = folder, "", folder
        self.start = self.begun = time.monotonic()

    def begin(self, name: str) -> None:
        self.name, self.begun = name, time.monotonic()

    def end(self, what: str, then: str = "") -> None:
        print(f"  {self.name:<9}{time.monotonic() - self.begun:>6.1f} s  {what}", flush=True)
        self.begin(then)


def _check(config: Any, folder: Path, num_rows: int) -> str:
    """Checks the settings as they are, then makes the small form of them: `folder/conf/rehearsed.yaml`."""
    from sft.commands.train import check
    from sft.training.prepare import setup

    small = copy.deepcopy(config)
    if config.adapter:
        small.adapter.quantize = False  # 4 bits need CUDA, which this machine may lack
    num_ranks, accumulation = check(small)
    settings: Any = OmegaConf.to_container(config)
    run = Run.of(settings)
    check_writable(run.folder, "runs_dir")
    check_writable(Path(config.data.cache_dir), "data.cache_dir")
    _cut(small.data, folder, num_rows)
    prepared = setup(small)
    stop = check_stops(prepared)
    _shrink(small, prepared, folder)
    (folder / "conf").mkdir()
    quiet = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    hydra = {"run": {"dir": "."}, "output_subdir": None}
    rehearsed = {"defaults": ["_self_", *quiet], **small, "hydra": hydra}
    OmegaConf.save(OmegaConf.create(rehearsed), folder / "conf" / "rehearsed.yaml")
    sources = [counts for split in prepared.splits.ledger.values() for counts in split.get("sources", [])]
    rows, lost = sum(each["rows"] for each in sources), sum(sum(each["lost"].values()) for each in sources)
    return (
        f"{run.folder} ({run.status.get('state', 'new')}): {num_ranks} ranks × {accumulation} micro-batches of "
        f"{config.micro_batch_size}; of the first {rows} rows {lost} are lost; {len(prepared.splits.train)} samples "
        f"end in {stop}"
    )


def check_stops(prepared: Any) -> str:
    """The tokens at which the exported model will stop; refuses samples that don't teach it to."""
    from sft.data.chat_template import special_ids
    from sft.data.mask import IGNORE

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
    return " or ".join(tokenizer.decode([token]) for token in stops)


def check_writable(folder: Path, setting: str) -> None:
    """Writes a folder there, or in the one that it would be made in, and removes it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".sft-rehearsal-", dir=existing).cleanup()
    except OSError as error:
        raise UserError(
            f"{folder} can't be written ({existing}: {error.strerror}): set {setting} to another folder"
        ) from error


def _cut(data: Any, folder: Path, num_rows: int) -> None:
    """The first rows, in a cache of their own, however many of them are lost."""
    paths = [each for path in (data.path, data.val_path) for each in (path if OmegaConf.is_list(path) else [path])]
    # A data set that `datasets` has saved has no slices: it stays whole.
    saved = [Path(path) / name for path in paths if path for name in ("dataset_dict.json", "state.json")]
    if not any(file.exists() for file in saved):
        for name in ("split", "val_split"):
            if data[name] and "[" not in data[name]:
                data[name] = f"{data[name]}[:{num_rows}]"
    data.cache_dir, data.max_lost = str(folder / "cache"), 1.0
    if data.val_size:  # of a few rows the user's share may be none at all, and their number all
        data.val_size = max(data.val_size, 0.1) if data.val_size < 1 else min(data.val_size, num_rows // 10)


def _shrink(config: Any, prepared: Any, folder: Path) -> None:
    """Makes of a configuration that of a run of seconds."""
    from sft.proof.shrink import write_model

    source = prepared.source
    write_model(folder / "model", source.load_config(), None, config.seed, source.trust_remote_code)
    config.model.tokenizer = source.tokenizer or source.path
    config.model.path, config.model.init, config.model.config = str(folder / "model"), "pretrained", {}
    if config.model.attention.startswith("flash"):
        config.model.attention = "packed"
    config.model.compile = False  # would take longer than all else
    lengths = [split.lengths.max() for split in (prepared.splits.train, prepared.splits.val) if split]
    config.data.max_length = int(max(lengths))
    ranks = NUM_RANKS if config.strategy else 1
    config.trainer.accelerator, config.trainer.devices, config.trainer.num_nodes = "cpu", ranks, 1
    if config.trainer.precision not in PRECISIONS:
        config.trainer.precision = "32-true"
    if config.strategy:
        config.strategy.pop("process_group_backend", None)
    config.micro_batch_size, config.global_batch_size = 1, ranks * 2
    config.epochs = config.max_steps = STEPS
    config.val_every = config.checkpoint.save_every = SAVED
    config.callbacks = {
        **(config.callbacks or {}),
        "rehearsal": {"_target_": "sft.proof.rehearsal.SignalInStep", "step": SIGNALLED},
    }
    config.runs_dir, config.run, config.export = str(folder / "runs"), "rehearsal", False


def _rehearse(folder: Path, stages: Stages, timeout: float) -> None:
    """The commands, each in a process of its own."""
    from sft.proof import rehearsal
    from sft.runs.signals import EXIT_CODE

    train = ["train", "--config-dir", str(folder / "conf"), "--config-name", "rehearsed"]
    of_run = ["run=rehearsal", f"runs_dir={folder / 'runs'}"]
    printed: list[str] = []

    def run(stage: str, arguments: list[str], seen: Any = None, expected: int = 0) -> None:
        printed.clear()
        stages.begin(stage)
        stages.log = folder / f"{stage}.log"
        rehearsal.run(arguments, stages.log, seen or printed.append, timeout, expected)

    def told(pattern: str) -> str:
        """The last of what a command has printed in this form."""
        found = [match[0] for line in printed if (match := re.search(pattern, line))]
        if not found:
            raise rehearsal.Failed(f"it has not printed a line like {pattern!r}", users=False)
        return found[-1]

    def training(line: str) -> None:
        """Tells the stages of one process apart by what it prints."""
        printed.append(line)
        if stages.name == "train" and re.match("step +1/", line):
            validates = any(each.startswith("step 0: validation") for each in printed)
            stages.end(told(r"loss [\w.]+"), then="validate" if validates else "save")
        elif stages.name == "validate" and line.startswith(f"step {SAVED}: validation"):
            stages.end(told(r"validation loss [\w.]+"), then="save")
        elif stages.name == "save" and line.startswith(f"step {SAVED}: saved"):
            stages.end(f"step {SAVED}", then="SIGUSR1")

    run("train", train, training, EXIT_CODE)
    stages.end(told("stopped by SIGUSR1 after step .*"))
    run("resume", train)
    stages.end(f"{told('resumed after step .*')}, finished{told(' after .* steps')}")
    run("export", ["export", *of_run])
    stages.end(told("the log-probabilities of .*"))
    run("generate", ["generate", *of_run, "--prompt", "Hello", "max_new_tokens=8"])
    stages.end("a prompt is answered")
