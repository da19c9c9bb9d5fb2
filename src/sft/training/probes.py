"""Probes: a few samples whose log-probabilities prove that an exported model is the trained one."""

import numpy as np
import torch

from sft.data.batch import make_batch, to_device
from sft.export.verify import Probe
from sft.model.loss import token_log_probs
from sft.training.datamodule import SFTDataModule
from sft.training.module import SFTModule

NUM_PROBES = 4
MAX_TOKENS = 512


def measure(module: SFTModule, data: SFTDataModule) -> list[Probe]:
    """log p of each token of the first few samples, each by itself, by the model as it is in training.

    The model runs in evaluation mode and in the precision of the training steps; no random number is drawn.
    """
    training, samples = module.model.training, data.val or data.train
    module.model.eval()
    try:
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            probes: list[Probe] = []
            for index in range(min(NUM_PROBES, len(samples))):
                batch = to_device(make_batch(samples, np.array([index]), 1), module.device)
                log_probs = token_log_probs(module.model, batch, plain_head=module.plain_head)
                ids = batch["input_ids"][0, :MAX_TOKENS].tolist()
                probes.append({"input_ids": ids, "log_probs": log_probs[:MAX_TOKENS].tolist()})
    finally:
        module.model.train(training)
    return probes
