"""From a composed configuration to what training, preview and scoring work on: tokenizer, samples, plan."""

import logging
import os
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from sft.training.log import is_main, log


@dataclass(frozen=True)
class Prepared:
    """A model's source and tokenizer, and the samples as this model reads them."""

    source: Any  # sft.model.loading.ModelSource
    tokenizer: Any
    data_config: Any  # sft.data.dataset.DataConfig
    splits: Any  # sft.data.dataset.Splits
    data: Any  # sft.training.datamodule.SFTDataModule

    @property
    def stop_token_ids(self) -> list[int]:
        """What the training samples end with, commonest first: where generation has to stop."""
        train = self.splits.train
        last = Counter(int(train[index][0][-1]) for index in range(min(len(train), 1000)))
        return [token for token, _ in last.most_common()]


def model_source(config: Any) -> Any:
    """The `ModelSource` that a configuration's `model` and `adapter` mean."""
    from hydra.utils import instantiate

    adapter = instantiate(config.get("adapter"), _convert_="all") or None
    return replace(instantiate(config["model"], _convert_="all"), adapter=adapter)


def setup(config: Any, start_step: int = 0) -> Prepared:
    """Checks model, tokenizer and data against each other; builds or opens the token stores."""
    from hydra.utils import instantiate

    from sft.training.datamodule import SFTDataModule

    source = model_source(config)
    data_config = instantiate(config.data, _convert_="all")
    tokenizer = source.load_tokenizer()
    source.check(tokenizer, data_config.max_length)
    splits = data_config.prepare(tokenizer, seed=config.seed, wait=not is_main(), log=log)
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
    )
    return Prepared(source, tokenizer, data_config, splits, data)


def quiet() -> None:
    """Leaves the terminal to what matters to the user."""
    import torch
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, if anything imports it, says that it finds none
    transformers_logging.disable_progress_bar()
    # Lightning's hints on hardware and on its own DataLoader, neither of which is used as it supposes.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec.*deprecated.*")
    warnings.filterwarnings("ignore", ".*GPU available but not used.*")
    warnings.filterwarnings("ignore", ".*`srun` command is available.*")
    warnings.filterwarnings("ignore", ".*DeepSpeed handles gradient clipping internally.*")
    warnings.filterwarnings("ignore", ".*`torch.distributed.*` is deprecated.*", FutureWarning)
    # DeepSpeed doesn't name the device when ranks meet; it was set before.
    warnings.filterwarnings("ignore", r".*barrier\(\): using the device under current context.*")
