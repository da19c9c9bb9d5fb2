"""The callback that has a run's model proven on its first samples before the first step."""

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback

from sft.data.batch import Batch, make_batch, to_device
from sft.model.first_batch import prove
from sft.model.isolation import use_attention
from sft.training.datamodule import SFTDataModule
from sft.training.log import log
from sft.training.module import SFTModule

NUM_SAMPLES = 3


class FirstBatch(Callback):
    """Comes after the callback that restores the weights of a resumed run."""

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
        source = module.source
        with trainer.precision_plugin.forward_context():
            proof = prove(
                module.model,
                first_samples(data, module),
                attention=source.attention,
                isolate=source.isolate,
                plain_head=module.plain_head,
            )
        use_attention(module.model, proof.isolation.attention)
        module.isolation = proof.isolation
        if proof.reason:
            log(proof.reason)


def first_samples(data: SFTDataModule, module: SFTModule) -> Batch:
    """The shortest of the first samples, the same on all ranks."""
    chosen = np.sort(np.argsort(data.train.lengths[:1000], kind="stable")[:NUM_SAMPLES])
    return to_device(make_batch(data.train, chosen, 1), module.device)
