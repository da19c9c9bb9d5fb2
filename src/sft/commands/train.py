"""sft train: fine-tune a model on prompts and responses. The same command again resumes an unfinished run.

  sft train model.path=Qwen/Qwen3-0.6B data.path=my.jsonl
      columns `prompt` and `response`; others: data.conversation.prompt=question data.conversation.response=answer
  sft train data=messages data.path=chats.jsonl model.path=...
      rows of chat messages; all shapes: conf/data/
  sft train experiment=gsm8k optimizer.lr=1e-5 epochs=2
      a recipe of conf/experiment/ with changes of your own
  sft train -m optimizer.lr=1e-5,2e-5 ...
      several runs, one after the other, and a table of them; at once in a cluster's queue: hydra/launcher=slurm
  sft train -m hydra/sweeper=optuna 'optimizer.lr=tag(log, interval(1e-5, 1e-3))' ...
      the setting with the lowest validation loss, looked for by Optuna; trials that do badly are ended early
  sft train ... --cfg job
      prints every setting with its value, and trains nothing

SIGUSR1 and SIGTERM save a checkpoint at the end of the step, and the run ends with exit code 75. A job for a cluster is
tried out beforehand by sft rehearse with the same settings.

What is trained: sft preview with the same settings. The run lies in runs/NAME/: config.yaml, data.json (what became
of each row), preview.html, metrics.csv, checkpoints/ and export/, the fine-tuned model.
"""

import math
import os
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from sft.data.step_plan import check_division
from sft.errors import UserError
from sft.runs import signals
from sft.runs.files import write_json
from sft.runs.results import Result
from sft.runs.run import Run


def main(config: Any) -> float | None:
    """Trains; the final validation loss, which a sweep compares, on the first rank."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    _, accumulation = check(config)
    run = Run.of(settings)
    if run.status.get("state") == "finished":
        print(f"{run.folder} is finished: nothing to do (another run: run=NAME; anew: remove the folder)")
        return Result.read(run).last

    from sft.checkpoint import checkpoint as checkpoints
    from sft.commands.export import export
    from sft.commands.preview import write_html
    from sft.ranks import disband
    from sft.training.fit import fit
    from sft.training.log import is_main, log
    from sft.training.metrics import MetricsFile
    from sft.training.prepare import quiet, setup
    from sft.training.trackers import tracking

    quiet()
    check_devices(config.trainer.accelerator, config.trainer.devices)
    resume = checkpoints.latest(run.checkpoints)
    prepared = setup(config, start_step=resume.step if resume else 0)
    data = prepared.data

    with run.attempt(settings, prepared.splits.fingerprint, data.num_steps, is_main()), tracking():
        if is_main():
            write_json(run.folder / "data.json", prepared.splits.ledger)
            write_html(run.folder / "preview.html", prepared)
        log(f"run {run.folder}: {data.num_steps} steps" + (f", resumed after step {resume.step}" if resume else ""))
        metrics = MetricsFile(run.folder / "metrics.csv")
        metrics.resume(data.start_step)
        if not (resume and resume.last):  # killed after its last step, all that is left is the export
            fit(
                config,
                prepared.source,
                data,
                accumulation=accumulation,
                checkpoints=run.checkpoints,
                resume=resume,
                loggers=[metrics, *trackers(config, run, metrics.rows)],
                facts={"seed": config.seed, "stop_token_ids": prepared.stop_token_ids},
            )
            if HydraConfig.get().mode is not RunMode.MULTIRUN:  # there the group is for the next setting, too
                disband()
        final = checkpoints.latest(run.checkpoints)
        assert final is not None and final.last
        if is_main() and config.export:
            with signals.shielded():  # once begun, it is ended
                export(run, final)
    if not is_main():
        return None
    summarise(run, metrics)
    return Result.read(run).last


def check(config: Any) -> tuple[int, int]:
    """Refuses what is seen to be wrong before anything is loaded; number of ranks and of micro-batches a step each."""
    check_numbers(config)
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
            "model.compile=true: what ZeRO-3 does before and after each layer breaks up every graph: set "
            "strategy=fsdp2, which shards as much, or model.compile=false"
        )
    if config.adapter and config.adapter.quantize:
        from sft.model.adapter import check_quantization

        check_quantization(HydraConfig.get().runtime.choices["strategy"], config.trainer.accelerator)
    return num_ranks, accumulation


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuses GPUs that this process doesn't see."""
    import torch

    visible = torch.cuda.device_count()
    if accelerator not in ("gpu", "cuda") and not (accelerator == "auto" and visible):
        return
    asked = max(1, devices) if isinstance(devices, int) else 1 if isinstance(devices, str) else max(devices) + 1
    if asked <= visible or (accelerator == "gpu" and torch.backends.mps.is_available()):
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = f"{visible} GPUs" + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES={hidden})")
    if visible and "SLURM_JOB_ID" in os.environ:
        advice = f"ask Slurm for --gpus-per-node={asked}, not --gpus-per-task: a rank must see all of its node's"
    elif visible:
        advice = f"set trainer.devices={visible} or less"
    else:
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        advice = f"set trainer=cpu, or see why torch {torch.__version__}, {built}, finds none (nvidia-smi)"
    raise UserError(f"trainer.accelerator={accelerator} with trainer.devices={devices}, and here are {seen}: {advice}")


def check_numbers(config: Any) -> None:
    """Refuses what isn't a whole number from 1 on, or null where that means something."""
    optional = ("max_steps", "val_every", "checkpoint.save_every")
    for name in ("epochs", "global_batch_size", "micro_batch_size", "checkpoint.keep_last", *optional):
        value = OmegaConf.select(config, name)
        if not (isinstance(value, int) and value > 0) and not (value is None and name in optional):
            raise UserError(f"{name}={value} is not a whole number from 1 on")


def world_size(config: Any) -> int:
    """Number of ranks that the trainer's settings mean."""
    devices = config.trainer.devices
    if devices in ("auto", -1, "-1"):
        import torch

        devices = max(1, torch.cuda.device_count())
    elif not isinstance(devices, int):
        devices = len(devices)
    return int(devices) * int(config.trainer.num_nodes)


def trackers(config: Any, run: Run, history: list[dict[str, str]]) -> list[Any]:
    """What `logger=` names, besides the metrics.csv that every run has."""
    from hydra.utils import instantiate

    if not config.logger:
        return []
    return [instantiate(config.logger)(run=run.folder.name, folder=run.folder, group=config.name, history=history)]


def summarise(run: Run, metrics: Any) -> None:
    """The run's figures and where everything lies."""
    speed = metrics.median("train/tokens_per_second")
    print(f"finished {run.folder} after {run.status['step']} steps")
    if not math.isnan(metrics.last("val/loss")):
        print(f"  validation loss   {metrics.first('val/loss'):.4f} before, {metrics.last('val/loss'):.4f} after")
    print(f"  speed             {speed:,.0f} tokens/s (median step)")
    if run.export.exists():
        print(f"  model             {run.export}")
    print(f"  metrics           {metrics.path}")
    print(f"  what was trained  {run.folder / 'preview.html'}, {run.folder / 'data.json'}", flush=True)
    for offline in sorted((run.folder / "wandb").glob("offline-run-*")):
        print(f"  to W&B            wandb sync {offline}", flush=True)
