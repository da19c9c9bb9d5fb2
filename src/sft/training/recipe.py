"""recipe.json: how a run trains as it really is, whatever the settings have left open. Written anew at each start."""

import os
import socket
from collections.abc import Iterable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sft.checkpoint.layout import full_shape
from sft.config import CONF
from sft.model import experts
from sft.model.attention import kernel
from sft.model.flops import of_model
from sft.ranks import together
from sft.runs.files import write_json
from sft.runs.identity import UNREAD, UNREAD_MEANS, flatten
from sft.runs.secrets import without_secrets
from sft.training.averaging import layout
from sft.training.datamodule import SFTDataModule
from sft.training.log import log
from sft.training.module import SFTModule
from sft.training.speed import device_peak
from sft.training.strategies import DeepSpeed

STRATEGIES = {"SingleDeviceStrategy": "single", "DDP": "ddp", "FSDP2": "fsdp2"}  # as conf/strategy/ calls them
SETTLED = {"trainer.devices", "trainer.num_nodes"}  # by what there is, if the settings leave them open


class Recipe(Callback):
    """Writes it into the run's folder, on the first rank."""

    def __init__(self, config: DictConfig, folder: Path) -> None:
        self.config, self.path = config, folder / "recipe.json"

    def on_fit_start(self, trainer: L.Trainer, module: SFTModule) -> None:
        hosts = together(lambda: os.environ.get("SLURMD_NODENAME", socket.gethostname()))
        if not trainer.is_global_zero:
            return
        try:
            write_json(
                self.path,
                {
                    **of_run(trainer, module),
                    "hosts": list(dict.fromkeys(hosts)),
                    "changed": without_secrets(changed(self.config)),
                },
            )
        except Exception as error:  # a record ends no run
            log(f"{self.path} isn't written: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


def of_run(trainer: L.Trainer, module: SFTModule) -> dict[str, object]:
    """What a trainer that is about to train has become."""
    data: SFTDataModule = trainer.datamodule  # type: ignore[attr-defined]
    model, source, where = module.model, module.source, layout(trainer, module)
    parameters = list(model.parameters())
    squares = int((data.train.lengths.astype(np.int64) ** 2).sum())
    flops = of_model(model).of(data.tokens_per_epoch, data.supervised_per_epoch, squares)
    cuda = module.device.type == "cuda"
    return {
        "num_ranks": trainer.world_size,
        "num_nodes": trainer.num_nodes,
        "strategy": strategy_name(trainer),
        "device": torch.cuda.get_device_name(module.device) if cuda else module.device.type,
        "precision": str(trainer.precision),
        "weights_dtype": _dtypes(parameters),
        "optimizer_dtype": _dtypes([part.holder for part in where.parts()]),
        "attention": module.isolation.attention,
        "samples": "one at a time" if module.isolation.apart else "packed",
        "attention_kernel": kernel(model, module.device, _arithmetic(trainer)),
        "experts": experts.kernel(model),
        "gradient_checkpointing": source.gradient_checkpointing,
        "activation_offload": source.activation_offload,
        "compile": source.compile,
        "micro_batch_size": data.micro_batch_size,
        "accumulation": trainer.accumulate_grad_batches,
        "global_batch_size": data.global_batch_size,
        "packing": data.packing,
        "pack_length": data.pack_length,
        "tokens_per_step": round(data.tokens_per_epoch / data.steps_per_epoch, 1),
        "supervised_tokens_per_step": round(data.supervised_per_epoch / data.steps_per_epoch, 1),
        "steps_per_epoch": data.steps_per_epoch,
        "num_steps": data.num_steps,
        "num_parameters": sum(map(_numel, parameters)),
        "num_trained_parameters": sum(_numel(parameter) for parameter in parameters if parameter.requires_grad),
        "optimizer": type(where.optimizer).__name__,
        "flops_per_token": round(flops / data.tokens_per_epoch),
        "peak_flops": device_peak(module.device, str(trainer.precision)),
    }


def strategy_name(trainer: L.Trainer) -> str:
    """As conf/strategy/ calls it; of a class of the user's own, its name."""
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeed):
        return f"deepspeed_zero{strategy.stage}" + "_offload" * strategy.offloads_optimizer
    return STRATEGIES.get(type(strategy).__name__, type(strategy).__name__)


def _arithmetic(trainer: L.Trainer) -> torch.dtype:
    return torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32


def _dtypes(tensors: Iterable[Tensor]) -> str:
    """Of the floating-point ones, or of those that hold packed bits."""
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))


def _numel(parameter: Any) -> int:
    """Weights of a parameter, however little of it is on this rank and however it is packed."""
    packed = getattr(parameter, "quant_state", None)  # of bitsandbytes
    return prod(packed.shape if packed is not None else full_shape(parameter))


def changed(config: DictConfig) -> dict[str, list[object]]:
    """The settings that are others than those of conf/train.yaml by itself: [default, value] by dotted name, None where
    one of the two lacks it."""
    default, own = _flat(_default()), _flat(config)
    pairs = {name: [default.get(name), own.get(name)] for name in sorted((default.keys() | own.keys()) - SETTLED)}
    return {name: pair for name, pair in pairs.items() if (pair[0] or None) != (pair[1] or None)}


@cache
def _default() -> DictConfig:
    local = (CONF / "local" / "default.yaml").exists()  # which are this machine's
    command, own = GlobalHydra.instance(), GlobalHydra.instance().hydra
    command.clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("train", ["~local"] if local else [])
    finally:
        command.hydra = own


def _flat(config: DictConfig) -> dict[str, object]:
    settings: Any = OmegaConf.to_container(config, resolve=True)
    if settings["data"]["conversation"].get("_target_") == UNREAD:
        settings["data"]["conversation"] = UNREAD_MEANS
    return {name: value for name, value in flatten(settings).items() if not name.endswith("_partial_")}
