"""What training must equal: a plain PyTorch loop in one process, one sample at a time, written out in full.

It shares no code with the training path except the learning-rate formula and an adapter's initial weights, which are
both configuration. The samples of each step are given; `check_order` checks their order independently.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from sft.model.adapter import initial

if TYPE_CHECKING:  # whose import touches CUDA, which must not happen before a fork
    from peft import LoraConfig

IGNORE = -100

# input_ids, labels, which are IGNORE where there is no loss, and what each token's loss is multiplied by
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Reference:
    """What the loop measured."""

    losses: list[float]  # of each step
    grad_norms: list[float]  # of each step, before clipping
    weights: dict[str, np.ndarray]  # after the last step
    movement: float  # largest change of a weight
    change: float  # of all weights together: root of the sum of squares


def train(
    folder: Path,
    steps: list[list[Sample]],
    make_optimizer: Callable[[list[dict[str, object]]], torch.optim.Optimizer],
    factor: Callable[[int, int], float],
    clip: float,
    adapter: "LoraConfig | None" = None,
    seed: int = 0,
) -> Reference:
    """Trains the model in `folder` on `steps`, each the samples of one optimizer step.

    `make_optimizer` is called with the two parameter groups; `factor(step, num_steps)` scales its learning rate. With
    an `adapter`, only the adapter is trained, from initial weights drawn from the seed.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    if adapter is not None:
        inject(model, adapter, seed)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    matrices = [parameter for parameter in parameters.values() if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters.values() if parameter.dim() <= 1]
    optimizer = make_optimizer([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}])
    peak = optimizer.param_groups[0]["lr"]
    losses, grad_norms = [], []
    for number, samples in enumerate(steps):
        divisor = sum(float(token_weights[1:][labels[1:] != IGNORE].sum()) for _, labels, token_weights in samples)
        loss = 0.0
        optimizer.zero_grad()
        for ids, labels, token_weights in samples:
            logits = model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False).logits[0]
            target = torch.tensor(labels[1:].astype(np.int64))
            nll = F.cross_entropy(logits[:-1], target, reduction="none", ignore_index=IGNORE)
            term = (torch.tensor(token_weights[1:]) * nll).sum() / divisor
            term.backward()
            loss += term.item()
        grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
        if norm > clip:
            for grad in grads:
                grad.mul_(clip / (norm + 1e-6))  # as torch and DeepSpeed guard against a norm of 0
        for group in optimizer.param_groups:
            group["lr"] = peak * factor(number, len(steps))
        optimizer.step()
        losses.append(loss)
        grad_norms.append(norm)
    weights = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    changes = np.concatenate([(weights[name] - first[name]).ravel() for name in weights])
    return Reference(losses, grad_norms, weights, float(np.abs(changes).max()), float(np.linalg.norm(changes)))


def inject(model: PreTrainedModel, adapter: "LoraConfig", seed: int) -> None:
    """Adds an adapter with the project's own initial weights, which no library defines."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapter, model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:  # others begin as what the base has
                parameter.copy_(initial(name, parameter.shape, adapter.init_lora_weights))


def check_order(steps: list[list[int]], num_samples: int) -> bool:
    """Whether the steps take every sample once before any sample a second time."""
    order = [sample for step in steps for sample in step]
    epochs = [order[start : start + num_samples] for start in range(0, len(order), num_samples)]
    return all(len(set(epoch)) == len(epoch) and set(epoch) <= set(range(num_samples)) for epoch in epochs)
