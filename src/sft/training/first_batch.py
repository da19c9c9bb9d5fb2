"""The callback that has a run's model proven on its first samples before the first step, once for each kind of device
and set of versions."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from sft.data.batch import SampleSet
from sft.model.first_batch import Prover
from sft.model.found import Proof
from sft.model.isolation import Isolation, use_attention
from sft.model.loading import ModelSource
from sft.model.loss import head_is_plain_matrix
from sft.ranks import together
from sft.runs import events, provenance
from sft.training.datamodule import SFTDataModule
from sft.training.log import log
from sft.training.module import SFTModule
from sft.training.strategies import placement

NUM_SAMPLES = 3
MIN_TOKENS, MAX_TOKENS = 48, 96  # of a sample, where there are such
PACKAGES = ("torch", "transformers", "peft", "mamba-ssm", "causal-conv1d", "flash-linear-attention", "flash-attn")


class FirstBatch(Callback):
    """Comes after the callback that restores the weights of a resumed run.

    Args:
        folder: of the run, in whose provenance.json the result is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        model, where = module.model, conditions(trainer, module)
        # What the first rank reads, for all.
        before = together(lambda: provenance.first_batch(self.folder))[0]
        known = Isolation(before["attention"], before["apart"]) if before else None
        if known and before and before["where"] == where:
            module.isolation = known
        else:
            proof = prove(trainer, module)
            module.isolation = proof.isolation
            log(f"first batch: {proof.said} ({proof.seconds:.1f} s)")
            if moved := known is not None and known != proof.isolation:
                log(f"first batch: samples ran {known} until here, and run {proof.isolation} from now on")
            if trainer.is_global_zero:
                code = {"code": name} if (name := remote_code(model, module.source)) else {}
                provenance.amend(self.folder, first_batch={**proof.record(), "where": where}, **code)
                found = {"attention": proof.isolation.attention, "apart": proof.isolation.apart}
                changed = {"changed": f"samples run {proof.isolation}, no longer {known}"} if moved else {}
                events.record(self.folder, "first_batch", step=trainer.global_step, **found, **changed)
        use_attention(model, module.isolation.attention)


def prove(trainer: L.Trainer, module: SFTModule) -> Proof:
    """That of a trainer's model on its training samples."""
    data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
    place = placement(trainer.strategy)

    @contextmanager
    def forward() -> Iterator[None]:
        with trainer.precision_plugin.forward_context(), place.forward(module.model):
            yield

    proof = _prover(module.model, module.source, data, module.device, str(trainer.precision), forward).prove()
    if module.router:
        module.router.logits = None
    for part in module.model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()  # the outermost is still gathered, which the first rank alone would end in Recipe
    return proof


def prove_here(config: DictConfig, source: ModelSource, data: SFTDataModule) -> Proof:
    """That of a configuration's model on this machine's device, by one process without a strategy."""
    precision, gpu = str(config.trainer.precision), torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(config.seed)
    model = source.load(torch.bfloat16 if precision == "bf16-true" else torch.float32)
    nn.Module.to(model, device)
    bf16 = precision.startswith("bf16")
    return _prover(
        model, source, data, device, precision, lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    ).prove()


def _prover(
    model: PreTrainedModel,
    source: ModelSource,
    data: SFTDataModule,
    device: torch.device,
    precision: str,
    forward: Callable[[], AbstractContextManager[object]],
) -> Prover:
    passes = data.num_packs / data.micro_batch_size
    return Prover(
        model,
        first_samples(data.train, device),
        attention=source.attention,
        isolate=source.isolate,
        plain_head=head_is_plain_matrix(model),
        dtype=torch.bfloat16 if precision.startswith("bf16") else torch.float32,
        forward=forward,
        per_pass=(len(data.train) / passes, data.tokens_per_epoch / passes),
        longest=longest(data),
    )


def longest(data: SFTDataModule) -> tuple[int, int] | None:
    """Tokens of the longest row that training may have, and of its longest sample; None where a row is one sample."""
    if not data.packing and data.micro_batch_size == 1:
        return None
    sample = int(data.train.lengths.max())
    pack = data.pack_length if data.packing else sample
    return min(data.micro_batch_size * pack, data.tokens_per_epoch), sample


def conditions(trainer: L.Trainer, module: SFTModule) -> dict[str, object]:
    """Under which a proof holds: a resumed run under others has its model proven anew."""
    source, cuda = module.source, module.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(module.device) if cuda else module.device.type,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
        "versions": {package: found for package in PACKAGES if (found := _version(package))},
        "settings": {
            "attention": source.attention,
            "isolate": source.isolate,
            "gradient_checkpointing": source.gradient_checkpointing,
        },
        "longest": list(row) if (row := longest(trainer.datamodule)) else None,  # type: ignore[attr-defined]
    }


def first_samples(samples: SampleSet, device: torch.device) -> list[Tensor]:
    """Token ids of a few of the first samples: the shortest that are not too short, cut at `MAX_TOKENS`. The same on
    all ranks."""
    lengths = samples.lengths[:1000]
    order = np.argsort(lengths, kind="stable")
    enough = order[lengths[order] >= MIN_TOKENS]
    chosen = enough[:NUM_SAMPLES] if len(enough) >= NUM_SAMPLES else order[-NUM_SAMPLES:]
    ids = [samples[int(index)][0][:MAX_TOKENS].astype(np.int64) for index in chosen]
    while len(ids) < NUM_SAMPLES:  # of a data set of one or two
        ids.append(ids[0])
    return [torch.from_numpy(one).to(device) for one in ids]


def remote_code(model: PreTrainedModel, source: ModelSource) -> str | None:
    """Where the code of a model is from, as `path@commit`, if it isn't transformers' own."""
    if not any(kind.__module__.startswith("transformers_modules") for kind in type(model).__mro__):
        return None
    commit = getattr(model.config, "_commit_hash", None) or source.base_revision
    return f"{source.base}@{commit}" if commit else str(source.base)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
