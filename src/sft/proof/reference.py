"""What training must equal: a plain PyTorch loop in one process, one sample at a time, written out in full.

It shares no code with the training path except the learning-rate formula, an adapter's initial weights and NEFTune's
random numbers, which are all configuration. The samples of each step are given; `check_order` checks their order
independently.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sft.data.batch import token_keys
from sft.model.adapter import initial
from sft.model.model_class import of_folder
from sft.model.noise import uniform

if TYPE_CHECKING:  # whose import touches CUDA, which must not happen before a fork
    from peft import LoraConfig

IGNORE = -100
NO_DECAY = re.compile(r"(bias|A_log|dt_bias|\.D|norm\d*\.weight)$")  # of parameters, whatever their shape

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
    averages: dict[str, np.ndarray]  # of the weights, if they are asked for
    noise: float = 0.0  # how far matrix products in bf16 take all weights together from these
    rounding: float = 0.0  # how far a rounding of the first weights takes a weight from these; 0: not measured

    def with_noise(self, rounded: "Reference") -> "Reference":
        """From the same loop with products in bf16."""
        return replace(self, noise=float(np.linalg.norm(self._differences(rounded))))

    def with_rounding(self, moved: "Reference") -> "Reference":
        """From the same loop whose first weights are a rounding away."""
        return replace(self, rounding=float(np.abs(self._differences(moved)).max()))

    def _differences(self, other: "Reference") -> np.ndarray:
        return np.concatenate([(other.weights[name] - weight).ravel() for name, weight in self.weights.items()])


def train(
    folder: Path,
    steps: list[list[Sample]],
    make_optimizer: Callable[[list[dict[str, object]]], torch.optim.Optimizer],
    factor: Callable[[int, int], float],
    clip: float,
    adapter: "LoraConfig | None" = None,
    seed: int = 0,
    variant: Mapping[str, Any] | None = None,
    numbers: list[list[int]] | None = None,
    rounded: bool = False,
    moved: bool = False,
) -> Reference:
    """Trains the model in `folder` on `steps`, each the samples of one optimizer step.

    `make_optimizer` is called with the parameter groups; `factor(step, num_steps)` scales their learning rates. With an
    `adapter`, only the adapter is trained, from initial weights drawn from the seed. `variant`: settings by dotted name
    that differ from the defaults; `numbers`: of the samples of each step. `rounded`: matrix products in bf16, all else
    in fp32; `moved`: each weight begins as the next number above or below it.
    """
    variant = variant or {}
    model = of_folder(str(folder)).from_pretrained(folder, dtype=torch.float32).train()
    if adapter is not None:
        inject(model, adapter, seed)
    if moved:
        move(model, seed)
    for name, parameter in model.named_parameters():
        if any(fnmatchcase(name, pattern) for pattern in variant.get("parameters.freeze", ())):
            parameter.requires_grad = False
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    first = {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters.items():
        options: Mapping[str, Any] = next(
            (group for group in variant.get("parameters.groups", ()) if fnmatchcase(name, group["match"])), {}
        )
        decays = parameter.dim() > 1 and not NO_DECAY.search(name)
        chosen = {key: value for key, value in options.items() if key != "match"}
        group = ({} if decays else {"weight_decay": 0.0}) | chosen
        groups.setdefault(str(group), {"params": [], **group})["params"].append(parameter)
    optimizer = make_optimizer(list(groups.values()))
    peaks = [group["lr"] for group in optimizer.param_groups]
    noise: list[torch.Tensor] = []  # of the embeddings of the sample under way
    if variant.get("model.neftune_alpha"):
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + noise[0])
    losses, grad_norms = [], []
    averages: dict[str, np.ndarray] = {}
    averaging = variant.get("averaging")
    for number, samples in enumerate(steps):
        divisor = sum(float(token_weights[1:][labels[1:] != IGNORE].sum()) for _, labels, token_weights in samples)
        num_tokens, loss = sum(len(ids) for ids, _, _ in samples), 0.0
        optimizer.zero_grad()
        for place, (ids, labels, token_weights) in enumerate(samples):
            if numbers and variant.get("model.neftune_alpha"):
                keys, width = token_keys(seed, number, numbers[number][place], len(ids)), model.config.hidden_size
                size = variant["model.neftune_alpha"] / (len(ids) * width) ** 0.5
                noise[:] = [size * uniform(torch.from_numpy(keys), width)]
            inputs = {"input_ids": torch.tensor(ids[None].astype(np.int64)), "use_cache": False}
            if variant.get("loss.router_aux"):
                inputs["output_router_logits"] = True
            with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
                outputs = model(**inputs)
            logits = outputs.logits[0, :-1].float()
            target = torch.tensor(labels[1:].astype(np.int64))
            scale = torch.tensor(token_weights[1:]) * (target != IGNORE) / divisor
            nll = F.cross_entropy(logits, target, reduction="none", ignore_index=IGNORE)
            term = (scale * nll).sum()
            loss += term.item()
            if smoothing := variant.get("loss.label_smoothing"):
                term = (1 - smoothing) * term + smoothing * (scale * -logits.log_softmax(-1).mean(-1)).sum()
            if z_loss := variant.get("loss.z_loss"):
                term = term + z_loss * (scale * logits.logsumexp(-1) ** 2).sum()
            if router_aux := variant.get("loss.router_aux"):
                term = term + router_aux * outputs.aux_loss * len(ids) / num_tokens
            term.backward()
        grads = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
        norm = torch.cat([grad.flatten() for grad in grads]).double().norm().item()  # a sum in fp32 is off by 1e-5
        if norm > clip:
            for grad in grads:
                grad.mul_(clip / (norm + 1e-6))  # as torch and DeepSpeed guard against a norm of 0
        for made, peak in zip(optimizer.param_groups, peaks, strict=True):
            made["lr"] = peak * factor(number, len(steps))
        optimizer.step()
        if averaging and number + 1 >= averaging["start"]:
            now = {name: parameter.detach().numpy().astype(np.float64) for name, parameter in parameters.items()}
            kept = averages or now
            decay = averaging["decay"]
            averages = {name: decay * kept[name] + (1 - decay) * now[name] for name in now}
        losses.append(loss)
        grad_norms.append(norm)
    weights = {name: parameter.detach().numpy() for name, parameter in parameters.items()}
    changes = np.concatenate([(weights[name] - first[name]).ravel() for name in weights])
    if all(parameter.requires_grad for parameter in model.parameters()):  # else the base model has them
        saved = model.state_dict().keys()
        weights |= {name: buffer.numpy() for name, buffer in model.named_buffers() if name in saved}
    return Reference(
        losses, grad_norms, weights, float(np.abs(changes).max()), float(np.linalg.norm(changes)), averages
    )


def inject(model: PreTrainedModel, adapter: "LoraConfig", seed: int) -> None:
    """Adds an adapter with the project's own initial weights, which no library defines."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(adapter, model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:  # others begin as what the base has
                parameter.copy_(initial(name, parameter.shape, adapter.init_lora_weights))


def move(model: PreTrainedModel, seed: int) -> None:
    """Moves each weight to the next number above or below it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))


def check_order(steps: list[list[int]], num_samples: int) -> bool:
    """Whether the steps take every sample once before any sample a second time."""
    order = [sample for step in steps for sample in step]
    epochs = [order[start : start + num_samples] for start in range(0, len(order), num_samples)]
    return all(len(set(epoch)) == len(epoch) and set(epoch) <= set(range(num_samples)) for epoch in epochs)
