"""The callback that has a run's model proven on its first samples before the first step."""

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sft.data.batch import SampleSet
from sft.model.first_batch import Prover
from sft.model.isolation import use_attention
from sft.training.datamodule import SFTDataModule
from sft.training.log import log
from sft.training.module import SFTModule

NUM_SAMPLES = 3
MIN_TOKENS, MAX_TOKENS = 48, 96  # of a sample, where there are such


class FirstBatch(Callback):
    """Comes after the callback that restores the weights of a resumed run."""

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        source = module.source
        num = data.num_packs / data.micro_batch_size
        proof = Prover(
            module.model,
            first_samples(data.train, module.device),
            attention=source.attention,
            isolate=source.isolate,
            plain_head=module.plain_head,
            dtype=torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32,
            forward=trainer.precision_plugin.forward_context,
            per_pass=(len(data.train) / num, data.tokens_per_epoch / num),
        ).prove()
        if module.router:
            module.router.logits = None
        for part in module.model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # the outermost is still gathered, which the first rank alone would end in Recipe
        use_attention(module.model, proof.isolation.attention)
        module.isolation = proof.isolation
        for line in proof.lines():
            log(line)


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
