"""Makes tokenizer, samples and step plan of a composed configuration, for training, preview and rehearsal."""

import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from sft.config.literal import instantiate
from sft.data.chat_template import special_ids
from sft.data.clock import settled, today
from sft.data.dataset import Datasets, wait_until
from sft.evaluation import general_text
from sft.export.folder import empty_model
from sft.model.fingerprint import Fingerprint, fingerprint, of_template
from sft.model.loading import ModelSource
from sft.model.parameters import Parameters, groups
from sft.runs.identity import UNREAD
from sft.runs.run import Run
from sft.training.datamodule import SFTDataModule
from sft.training.log import is_main, log
from sft.training.shape import said, settle_data


@dataclass(frozen=True)
class Prepared:
    """A model's source and tokenizer, and the samples as this model reads them."""

    source: ModelSource
    tokenizer: PreTrainedTokenizerFast
    splits: Datasets
    data: SFTDataModule
    template: dict[str, object]  # what the chat template is rendered with

    def fingerprint(self, cache_dir: str, weights: bool) -> Fingerprint:
        """Of model, tokenizer and chat template; of the model's weights where they are read."""
        template = str(self.tokenizer.chat_template or "")
        return fingerprint(self.source, Path(cache_dir), weights=weights, template=template)

    @property
    def stop_token_ids(self) -> list[int]:
        """The special tokens that end the responses of the training data, commonest first: where a server has to
        stop."""
        train, ends = self.splits.train, Counter[int]()
        for counts in train.counts:
            ends.update({int(token): number for token, number in counts.get("stops", {}).items()})
        if not ends:  # of a store that was built elsewhere
            ends.update(int(train[index][0][-1]) for index in range(min(len(train), 1000)))
        special = special_ids(self.tokenizer)
        return [token for token, _ in ends.most_common() if token in special]


def model_source(config: DictConfig, run: Run | None = None) -> ModelSource:
    """The model that a configuration's `model` and `adapter` name, and which of its `parameters` are trained. Of a Hub
    name, the run's own commit."""
    adapter = instantiate(config.get("adapter"), _convert_="all") or None
    parameters = Parameters(**instantiate(config.get("parameters"), _convert_="all") or {})
    source: ModelSource = replace(instantiate(config["model"], _convert_="all"), adapter=adapter, parameters=parameters)
    commit = run.model.get("configuration", {}).get(str(source.path)) if run else None
    return replace(source, revision=commit) if commit and not source.tokenizer else source


def check_model(run: Run, source: ModelSource, weights: bool, template: str | None = None) -> None:
    """UserError if files of the model have changed since the run began; `weights`: its weights are read, too;
    `template`: the chat template, where it and the tokenizer are used."""
    if run.model:
        run.check_model(fingerprint(source, Path(run.config["data"]["cache_dir"]), weights=weights, template=template))


def template_settings(
    settings: Mapping[str, object], tokenizer: PreTrainedTokenizerBase, run: Run | None, main: bool = True
) -> dict[str, object]:
    """What the chat template is rendered with: `settings` are those of `model.template`, and the day, if the template
    asks for it and they don't say, is that on which the run was begun; without a run, or before it is begun, today.

    Ranks may begin on different days: all but the first (`main`) take the one that the first has recorded.
    """

    def day() -> str:
        if run is None:
            return today()
        if not main:
            wait_until(lambda: run.day, log)
        return run.day or today()

    return settled(tokenizer.chat_template, settings, day)


def setup(
    config: DictConfig, start_step: int = 0, run: Run | None = None, weights: Literal["read", "here"] | None = None
) -> Prepared:
    """Checks model, tokenizer and data against each other; builds or opens the token stores.

    `weights`: that the model's files hold them is checked first if they are to be read, or are here.
    """
    if config.data.conversation._target_ == UNREAD:  # no command line has settled it
        settle_data(config)
    for line in said():
        log(line)
    source = model_source(config, run)
    data_config = instantiate(config.data, _convert_="all")
    tokenizer = source.load_tokenizer()
    source.check(tokenizer, data_config.max_length)
    if weights and (new := source.check_weights(download=weights == "read")):
        log(f"model: drawn at random, as model.new_weights says: {', '.join(sorted(new))}")
    if any(vars(source.parameters).values()):  # a pattern without a match is refused before anything is read
        empty = empty_model(source, adapter=source.adapter is not None)
        source.parameters.choose(empty)
        groups(empty, source.parameters)
    if run is not None:  # before any row is rendered by it
        run.check_model({"template": of_template(str(tokenizer.chat_template or ""))})
    template = template_settings(source.template, tokenizer, run, is_main())
    splits = data_config.datasets(tokenizer, seed=config.seed, template=template, wait=not is_main(), log=log)
    text = (config.get("evaluation") or {}).get("text")
    if text and splits.val is None:
        log("note: evaluation.text is measured at each validation, and without validation samples there is none")
        text = None
    data = SFTDataModule(
        splits.train,
        splits.val,
        seed=config.seed,
        epochs=config.epochs,
        max_steps=config.max_steps,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        max_length=data_config.max_length,
        packing=data_config.packing,
        start_step=start_step,
        val_sets=splits.val_sets,
        text=general_text.read(text, data_config, tokenizer, wait=not is_main(), log=log) if text else None,
    )
    return Prepared(source, tokenizer, splits, data, template)


# What Lightning logs whatever the user has asked for, and its modules that do: on the devices found, on products
# and options, on ranks, and on the end of what it takes for an epoch.
HINTS = re.compile(
    r"(GPU|TPU|HPU) available: |💡|Using (16bit|bfloat16) Automatic Mixed|You are using a CUDA device|LOCAL_RANK: "
    r"|-+\ndistributed_backend=|[Ii]nitializing (deepspeed )?distributed: |`Trainer\.fit` stopped: `max_epochs="
    r"|\nDetected KeyboardInterrupt|`Trainer\(\w+=1(\.0)?\)` was configured|Your model can run with static graph"
)
HINTING = (
    "fabric.utilities.distributed",
    "fabric.utilities.rank_zero",
    "pytorch.accelerators.cuda",
    "pytorch.strategies.deepspeed",
    "pytorch.utilities.rank_zero",
)


def _is_no_hint(record: logging.LogRecord) -> bool:
    return not HINTS.match(record.getMessage())


def quiet() -> None:
    """Leaves the terminal to what matters to the user."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed looks for one by itself, and says so
    transformers_logging.disable_progress_bar()
    for name in HINTING:
        logging.getLogger(f"lightning.{name}").addFilter(_is_no_hint)
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")
    warnings.filterwarnings("ignore", ".*`torch.distributed.*` is deprecated.*", FutureWarning)
    # DeepSpeed names no device where ranks meet; it was set before.
    warnings.filterwarnings("ignore", r".*barrier\(\): using the device under current context.*")
