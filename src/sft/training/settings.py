"""Refuses settings of a run that contradict each other or this machine, before anything is loaded."""

import os
import re

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf

from sft.data.step_plan import check_division
from sft.errors import UserError
from sft.training.launch import Launch

AUTO = ("auto", -1, "-1")  # all devices that there are


def check(config: DictConfig, here: bool = True) -> tuple[int, int]:
    """The number of ranks, and of micro-batches of a rank in a step; `UserError` for settings that contradict.
    `here`: on this machine; otherwise on others, which may have GPUs."""
    optional = ("max_steps", "val_every", "checkpoint.save_every")
    for name in ("epochs", "global_batch_size", "micro_batch_size", "checkpoint.keep_last", *optional):
        value = OmegaConf.select(config, name)
        if not (isinstance(value, int) and value > 0) and not (value is None and name in optional):
            raise UserError(f"{name}={value} is not a whole number from 1 on")
    num_ranks = world_size(config)
    accumulation = check_division(config.global_batch_size, num_ranks, config.micro_batch_size)
    if num_ranks > 1 and not config.strategy:
        raise UserError(f"strategy=single is for one device, and the trainer has {num_ranks}: set strategy=ddp")
    offload = OmegaConf.select(config, "strategy.config.zero_optimization.offload_optimizer")
    if offload and config.optimizer._target_ != "torch.optim.AdamW":
        raise UserError(
            f"this strategy keeps the optimizer's states on the {offload.device}, where DeepSpeed's own AdamW steps, "
            f"and the optimizer is {config.optimizer._target_}: set optimizer=adamw, or a strategy without offload"
        )
    if config.model.compile and OmegaConf.select(config, "strategy.config.zero_optimization.stage") == 3:
        raise UserError(
            "model.compile=true: ZeRO-3 works before and after each layer, which breaks up every graph: set "
            "strategy=fsdp2, which shards as much, or model.compile=false"
        )
    if config.adapter and config.adapter.quantize:
        from sft.model.adapter import check_quantization

        check_quantization(HydraConfig.get().runtime.choices["strategy"], config.trainer.accelerator, here)
    return num_ranks, accumulation


def world_size(config: DictConfig) -> int:
    """The number of ranks that the trainer's settings ask for."""
    num_devices, num_nodes = devices_and_nodes(config)
    return num_devices * num_nodes


def devices_and_nodes(config: DictConfig, launch: Launch | None = None) -> tuple[int, int]:
    """Devices of each node, and nodes. Where the settings leave them open, they are those of the launch, or else this
    machine's devices and one node."""
    launch = launch or Launch()
    num_devices, num_nodes = _count(config.trainer.devices), config.trainer.num_nodes
    if num_nodes == "auto":
        num_nodes = launch.num_nodes or max(1, launch.world_size // (num_devices or launch.world_size))
    elif not (isinstance(num_nodes, int) and num_nodes > 0):
        raise UserError(f"trainer.num_nodes={num_nodes} is neither a whole number from 1 on nor auto")
    if num_devices is None and launch.by:
        num_devices = max(1, launch.world_size // num_nodes)
    elif num_devices is None:
        num_devices = 1 if config.trainer.accelerator == "cpu" else _num_gpus()
    return num_devices, num_nodes


def settle(config: DictConfig, launch: Launch) -> None:
    """Puts numbers where the trainer's settings leave devices or nodes open; `UserError` if this process wasn't
    started as the settings mean."""
    num_devices, num_nodes = devices_and_nodes(config, launch)
    launch.check(num_devices, num_nodes)
    if _count(config.trainer.devices) is None:
        config.trainer.devices = num_devices
    config.trainer.num_nodes = num_nodes


def _count(devices: int | str | ListConfig) -> int | None:
    """How many devices `trainer.devices` names; None if it leaves that open."""
    if devices in AUTO:
        return None
    if isinstance(devices, str):  # "2", or "0,3"
        count = int(devices) if devices.isdecimal() else len(re.findall(r"\d+", devices))
    else:
        count = len(devices) if isinstance(devices, ListConfig) else devices
    if not (isinstance(count, int) and count > 0):
        raise UserError(
            f"trainer.devices={devices} is neither a number of devices from 1 on, nor a list of them, nor auto"
        )
    return count


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def check_devices(accelerator: str, devices: int | str | list[int]) -> None:
    """Refuses GPUs that this process doesn't see."""
    import torch

    visible = torch.cuda.device_count()
    if accelerator not in ("gpu", "cuda") and not (accelerator == "auto" and visible):
        return
    num_devices = max(1, devices) if isinstance(devices, int) else 1 if isinstance(devices, str) else max(devices) + 1
    if num_devices <= visible or (accelerator == "gpu" and torch.backends.mps.is_available()):
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{visible} GPUs" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})")
    if visible and "SLURM_JOB_ID" in os.environ:
        advice = f"ask Slurm for --gpus-per-node={num_devices}, not --gpus-per-task: a rank must see all of its node's"
    elif visible:
        advice = f"set trainer.devices={visible} or less"
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        advice = f"set trainer=cpu, or see why torch {torch.__version__}, {built}, finds none (nvidia-smi)"
    raise UserError(
        f"trainer.accelerator={accelerator} with trainer.devices={devices}, but this process sees {seen}: {advice}"
    )
