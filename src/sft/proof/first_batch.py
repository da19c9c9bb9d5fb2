"""The small form of a job's model, proven on this machine's processor before the job waits in a queue."""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from omegaconf import DictConfig
from transformers.utils import logging as transformers_logging

from sft.config.literal import instantiate
from sft.errors import UserError
from sft.model.first_batch import AUTO, Prover
from sft.model.found import Proof
from sft.model.loading import ModelSource
from sft.model.loss import head_is_plain_matrix
from sft.model.parameters import Parameters
from sft.proof.shrink import write_model

NUM_VOCAB = 64
LENGTHS = (19, 29, 23)  # tokens of its samples, more than a small window has


def prove_small(config: DictConfig) -> Proof | None:
    """What its first batch would say; None where the model's configuration isn't here, or no small form of it runs.

    Raises:
        UserError: the job would be refused.
    """
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    source: ModelSource = instantiate(config.model, _convert_="all")
    if not _is_here(source):
        return None
    with tempfile.TemporaryDirectory(prefix="sft-small-") as folder:
        try:
            write_model(Path(folder), source.load_config(), NUM_VOCAB, config.seed, source.trust_remote_code)
        except UserError:
            return None
        small = replace(
            source,
            path=folder,
            init="pretrained",
            config={},
            revision=None,
            attention=AUTO if source.attention.startswith("flash") else source.attention,  # which every machine has
            adapter=None,
            parameters=Parameters(),
            new_weights=None,
            add_tokens=None,
            compile=False,
        )
        model = small.load(torch.float32)
    draw = torch.Generator().manual_seed(config.seed)
    samples = [torch.randint(0, NUM_VOCAB, (length,), generator=draw) for length in LENGTHS]
    return Prover(
        model,
        samples,
        attention=small.attention,
        isolate=source.isolate,
        plain_head=head_is_plain_matrix(model),
    ).prove()


def _is_here(source: ModelSource) -> bool:
    """Whether the model's configuration can be read without a network."""
    if source.init == "random":
        return True
    base = str(source.base)
    return Path(base).expanduser().is_dir() or isinstance(
        try_to_load_from_cache(base, "config.json", revision=source.base_revision), str
    )
