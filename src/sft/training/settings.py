"""Refuses settings of a run that contradict each other or this machine, before anything is loaded."""

import os
import socket
import sys
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

from hydra._internal.utils import _locate
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from sft.config.check import check as left_over
from sft.config.check import targets
from sft.config.literal import instantiate
from sft.config.schema import OURS
from sft.data.step_plan import DEFAULT_PACKS, check_division
from sft.errors import UserError
from sft.runs import signals
from sft.runs.files import input_file
from sft.runs.manifest import Damaged
from sft.runs.plain import plain
from sft.runs.run import Run
from sft.runs.secrets import hidden
from sft.training import callbacks
from sft.training.launch import Launch

AUTO = ("auto", -1)  # all devices that there are
NEVER_STOPS = (
    "EarlyStopping never stops a run that has no validation data: set data.val_size or data.val_path, or leave the "
    "callback out"
)


def check_schema(config: DictConfig, command: str = "train", typed: Collection[str] = ()) -> None:
    """Refuses settings that are unknown or out of range. Drops those that an experiment has set for another option of a
    group than the one that was chosen, and says so. A group that was left out (~adapter) is empty.

    `typed`: names of the settings on the command line, which are never dropped.
    """
    settings: Any = OmegaConf.to_container(config, resolve=True)
    for name in left_over(settings, command, typed):
        group, _, last = name.rpartition(".")
        target = str(OmegaConf.select(config, f"{group}._target_") or "none").rpartition(".")[2]
        if group == "logger":
            target = ", ".join(each for each, value in config.logger.items() if isinstance(value, DictConfig)) or "csv"
        with open_dict(config):
            del OmegaConf.select(config, group)[last]
        say(f"note: {name} of the experiment is left out: {group} {target} has no such setting")
    with open_dict(config):
        for group in ("adapter", "strategy", "logger", "callbacks", "averaging") if "trainer" in config else ():
            config.setdefault(group, {})


def say(line: str) -> None:
    """Prints a line, on the first rank alone."""
    if all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID")):
        print(plain(hidden(line)), file=sys.stderr, flush=True)


def check(config: DictConfig, here: bool = True) -> tuple[int, int]:
    """The number of ranks, and of micro-batches of a rank in a step; `UserError` for settings that contradict.
    `here`: on this machine; otherwise on others, which may have GPUs."""
    signals.seconds(OmegaConf.select(config, "max_time"))
    num_ranks = world_size(config)
    accumulation = check_division(config.global_batch_size or DEFAULT_PACKS, num_ranks, config.micro_batch_size)
    if num_ranks > 1 and not config.strategy:
        raise UserError(f"strategy=single is for one device, and the trainer has {num_ranks}: set strategy=ddp")
    if config.optimizer._target_.startswith("bitsandbytes."):
        raise UserError(
            f"optimizer._target_={config.optimizer._target_}: no checkpoint holds its states, which are in 8 bits or "
            "in pages: set optimizer=adamw with a strategy that shares the states out (deepspeed_zero2, fsdp2) or "
            "keeps them in host memory (deepspeed_zero2_offload), or adapter=lora"
        )
    if config.trainer.precision == "bf16-true" and not config.adapter:
        raise UserError(
            "trainer.precision=bf16-true: a weight in bf16 moves by 1/256 of itself or not at all, so updates would be "
            "lost: set trainer.precision=bf16-mixed, which keeps weights in fp32 (under DeepSpeed those of the model "
            "are bf16 all the same), or adapter=lora, which is kept in fp32 beside frozen weights in bf16"
        )
    offload = OmegaConf.select(config, "strategy.config.zero_optimization.offload_optimizer")
    if offload and config.optimizer._target_ != "torch.optim.AdamW":
        raise UserError(
            f"this strategy keeps the optimizer's states on the {offload.device}, where DeepSpeed's own AdamW steps, "
            f"and the optimizer is {config.optimizer._target_}: set optimizer=adamw, or a strategy without offload"
        )
    stage = OmegaConf.select(config, "strategy.config.zero_optimization.stage")
    if config.trainer.gradient_clip_algorithm == "value" and config.trainer.gradient_clip_val and stage is not None:
        raise UserError(
            "trainer.gradient_clip_algorithm=value: DeepSpeed clips by norm alone: set strategy=fsdp2, which shards as "
            "much, or trainer.gradient_clip_algorithm=norm"
        )
    callbacks.check(target.rpartition(".")[::2] for _, target in targets(config.callbacks or {}))
    check_validation(config)
    if config.model.compile and stage == 3:
        raise UserError(
            "model.compile=true: ZeRO-3 works before and after each layer, which breaks up every graph: set "
            "strategy=fsdp2, which shards as much, or model.compile=false"
        )
    strategy = str(config.strategy._target_) if config.strategy else ""
    sharded = strategy.endswith(".FSDP2") or OmegaConf.select(config, "strategy.config.zero_optimization.stage") == 3
    if config.adapter and sharded:
        from sft.model.adapter import check_whole

        check_whole(config.adapter.get("use_dora", False), config.adapter.get("trainable_tokens"))
    if config.adapter and config.adapter.quantize:
        from sft.model.adapter import check_quantization

        check_quantization(HydraConfig.get().runtime.choices["strategy"], config.trainer.accelerator, here)
    return num_ranks, accumulation


def check_validation(config: DictConfig) -> None:
    """Refuses what compares validation losses where nothing is validated."""
    if config.data.val_size or config.data.get("val_path") or config.data.get("val_split"):
        return
    stopping = [target for _, target in targets(config.callbacks or {}) if target.endswith(".EarlyStopping")]
    if stopping and stopping[0].startswith(OURS):
        raise UserError(NEVER_STOPS)
    if config.checkpoint.export == "best":
        raise UserError(
            "checkpoint.export=best is the lowest validation loss, and the run has no validation data: set "
            "data.val_size or data.val_path, or checkpoint.export=last"
        )


def check_inputs(config: DictConfig) -> None:
    """Refuses a model and data that aren't there, before anything heavy is imported."""
    from sft.data.rows import local_files

    if text := (config.get("evaluation") or {}).get("text"):
        input_file(text, "evaluation.text")
    check_targets(config, only_own=True)
    model = instantiate(config.model, _convert_="all")
    model.check_files()
    training, validation = instantiate(config.data, _convert_="all").sources()
    names = [("data.path", source.path) for source in (*training, *validation) if local_files(source) is None]
    models = [("model.path", model.path), ("model.tokenizer", model.tokenizer)]
    names += [(setting, name) for setting, name in models if name and not Path(name).expanduser().exists()]
    check_hub(names)


def check_targets(config: DictConfig, only_own: bool = False) -> None:
    """Refuses a `_target_` that can't be imported. `only_own` leaves out those of Lightning and torch, which take
    seconds to import."""
    for name, target in targets(config):
        if only_own and target.startswith(OURS):
            continue
        try:
            _locate(target)
        except (ImportError, AttributeError, ValueError) as error:
            places = f"the installed packages, {Path.cwd()} and {Path.cwd() / 'src'}"
            raise UserError(f"{name}={target} is not found ({error.__cause__ or error}): looked in {places}") from error


def check_hub(names: list[tuple[str, str]]) -> None:
    """Leaves the Hub alone if it can't be reached, since each of its files would be asked for some ten seconds."""
    if not names or os.environ.get("HF_HUB_OFFLINE") or {"https", "all"} & getproxies().keys():
        return
    host = urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = host.port or (80 if host.scheme == "http" else 443)
    try:
        socket.create_connection((host.hostname or "", port), timeout=5).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the Hub's package is imported
        from sft.cluster import storage

        for setting, name in names:
            kind = "datasets" if setting.startswith("data") else "models"
            storage.check_hub(setting, name, kind, f"{host.hostname} can't be reached ({error.strerror or error})")


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


def settle_batch(config: DictConfig) -> None:
    """Where `global_batch_size` is left open, a run that was begun when its default was 16 keeps 16."""
    if config.global_batch_size is not None:
        return
    settings: Any = OmegaConf.to_container(config, resolve=True)
    run = Run.named({**settings, "global_batch_size": DEFAULT_PACKS})
    with suppress(OSError, Damaged):
        if run.config.get("global_batch_size") == DEFAULT_PACKS:
            with open_dict(config):
                config.global_batch_size = DEFAULT_PACKS


def _count(devices: int | str | ListConfig) -> int | None:
    """How many devices `trainer.devices` names; None if it leaves that open."""
    return None if devices in AUTO else len(devices) if isinstance(devices, ListConfig) else int(devices)


def _num_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def check_gpu(accelerator: str) -> None:
    """Refuses a GPU on a machine without any, by its device files: torch takes seconds to say so."""
    files = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
    if accelerator in ("gpu", "cuda") and sys.platform == "linux" and not any(map(os.path.exists, files)):
        raise UserError(
            f"trainer.accelerator={accelerator}, and this machine shows no GPU (none of {', '.join(files)}): set "
            "trainer=cpu, or start it where a GPU is"
        )


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
