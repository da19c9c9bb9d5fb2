"""Probes: a few samples whose log-probabilities prove that an exported model is the trained one."""

from typing import Any

import numpy as np
import torch

from sft.data.batch import make_batch, to_device

NUM_PROBES = 4
MAX_TOKENS = 512


def measure(module: Any, data: Any) -> list[dict[str, Any]]:
    """log p of each token of the first few samples, each by itself, by the model as it is in training.

    The model runs in evaluation mode and in the precision of the training steps; no random number is drawn.
    """
    training = module.model.training
    module.model.eval()
    try:
        with torch.no_grad(), module.trainer.precision_plugin.forward_context():
            probes = []
            for index in range(min(NUM_PROBES, len(data.probed))):
                batch = to_device(make_batch(data.probed, np.array([index]), 1), module.device)
                log_probs = module.objective.token_log_probs(module.model, batch)
                ids = batch["input_ids"][0, :MAX_TOKENS].tolist()
                probes.append({"input_ids": ids, "log_probs": log_probs[:MAX_TOKENS].tolist()})
    finally:
        module.model.train(training)
    return probes
