"""Refuses settings of a run that contradict each other or this machine, before anything is loaded."""

import os

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sft.data.step_plan import check_division
from sft.errors import UserError
from sft.runs import signals


def check(config: DictConfig, here: bool = True) -> tuple[int, int]:
    """The number of ranks, and of micro-batches of a rank in a step; `UserError` for settings that contradict.
    `here`: on this machine; otherwise on others, which may have GPUs."""
    optional = ("max_steps", "val_every", "checkpoint.save_every")
    for name in ("epochs", "global_batch_size", "micro_batch_size", "checkpoint.keep_last", *optional):
        value = OmegaConf.select(config, name)
        if not (isinstance(value, int) and value > 0) and not (value is None and name in optional):
            raise UserError(f"{name}={value} is not a whole number from 1 on")
    signals.seconds(OmegaConf.select(config, "max_time"))
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
    devices = config.trainer.devices
    if devices in ("auto", -1, "-1"):
        import torch

        devices = max(1, torch.cuda.device_count())
    elif not isinstance(devices, int):
        devices = len(devices)
    return int(devices) * int(config.trainer.num_nodes)


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
