"""sft train: fine-tune a model on prompts and responses. The same command again resumes an unfinished run.

  sft train model.path=Qwen/Qwen3-0.6B data.path=my.jsonl
      rows of any shape in docs/data.md: the first line says which; columns of another name are set, as in
      data.conversation.prompt=topic data.conversation.response=essay
  sft train data=messages data.path=chats.jsonl model.path=...
      rows of chat messages, whatever else they look like; conf/data/ has all row shapes
  sft train experiment=gsm8k optimizer.lr=1e-5 epochs=2
      a recipe of conf/experiment/ with changes of your own
  sft train -m optimizer.lr=1e-5,2e-5 ...
      several runs, one after the other, and a table of them; hydra/launcher=slurm queues them on a cluster
  sft train -m hydra/sweeper=optuna 'optimizer.lr=tag(log, interval(1e-5, 1e-3))' ...
      Optuna searches for the lowest validation loss and ends bad trials early
  sft train ... --cfg job
      prints every setting with its value and trains nothing

SIGUSR1, SIGTERM and the end of max_time=HOURS:MINUTES:SECONDS save a checkpoint at the end of the step and end the
command with exit code 75, Ctrl-C with 130; the same command resumes the run. sft preview with the same settings shows
the samples token by token; sft rehearse tries a cluster's job first.

The run's folder is runs/NAME/: report.html (what it learned), config.yaml, data.json (the rows used and lost),
preview.html, metrics.csv, checkpoints/ and export/, the fine-tuned model.
"""

import os
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sft.runs import computation, config_file, lease, manifest, provenance, signals, startup
from sft.runs.metrics_file import Metrics
from sft.runs.results import Result, after, summarise
from sft.runs.run import MLFLOW_LACKS, WANDB_LACKS, Run
from sft.runs.secrets import without_secrets
from sft.runs.stopped import lifted
from sft.training import extension
from sft.training.launch import find
from sft.training.settings import (
    check,
    check_devices,
    check_gpu,
    check_inputs,
    check_targets,
    say,
    settle,
    world_size,
)

if TYPE_CHECKING:
    from sft.data.dataset import Datasets
    from sft.training.prepare import Prepared


OLD = "is from before there were checksums of all files: only its shards are compared"


def main(config: DictConfig) -> float | None:
    """Trains; the final validation loss, which a sweep compares, on the first rank."""
    extended = extension.settle(config)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    launch = find(os.environ)
    settle(config, launch)
    check(config)
    signals.stop_after(signals.seconds(config.max_time))
    check_gpu(config.trainer.accelerator)
    # Not of several nodes, whose launchers end them, nor of a multirun, whose ranks start several times.
    if config.trainer.num_nodes == 1 and HydraConfig.get().mode is not RunMode.MULTIRUN:
        startup.begin(world_size(config), launched=bool(launch.by))
    else:
        startup.leave()
    run = Run.of(settings)
    seen = lease.look(run.folder) if launch.rank == 0 else None
    other_callbacks = lifted(run, settings.get("callbacks") or {})
    if run.status.get("state") == "finished" and not other_callbacks:
        if launch.rank == 0 and config_file.is_damaged(run.folder):
            run.mend(settings)
        print(f"{run.folder} is finished: nothing to do (another run: run=NAME; anew: remove the folder)")
        if "stopped_early" in run.status:
            print(f"  it ended {after(run)}\n  without that callback, or with more patience, it continues")
        if "WANDB_SWEEP_ID" in os.environ:
            repeat(config, run)
        for lacks, only in ((MLFLOW_LACKS, "mlflow_logger"), (WANDB_LACKS, "wandb_logger")):
            if "WANDB_SWEEP_ID" not in os.environ and (run.folder / lacks).exists():
                repeat(config, run, only)
        return Result.read(run).last

    check_inputs(config)
    if note := extension.hint(config, run):
        say(note)

    from sft.checkpoint import checkpoint as checkpoints
    from sft.checkpoint.save import drop_optimizer
    from sft.commands.export import at_the_end, export_run, said, try_export
    from sft.commands.preview import write_html
    from sft.data.ledger import in_one_line
    from sft.ranks import disband
    from sft.training import answers
    from sft.training.checkpointing import put_aside
    from sft.training.fit import fit
    from sft.training.length import check_schedule, lines
    from sft.training.log import is_main, log
    from sft.training.metrics_file import MetricsFile
    from sft.training.prepare import quiet, setup
    from sft.training.reporting import reported
    from sft.training.trackers import choose
    from sft.training.trackers.choose import tracking

    cluster = launch.enter()
    quiet()
    check_targets(config)
    check_devices(config.trainer.accelerator, config.trainer.devices)
    resume, skipped = checkpoints.to_resume(run.checkpoints)
    allow = (config.get("resume") or {}).get("allow") or []
    # Before a store is built with other code.
    trains = resume is not None and (other_callbacks or not resume.last)
    if resume and trains and (line := computation.check(run.folder, settings, allow, resume.step)):
        log(line)
    begins = extended if resume is None else None
    if begins:
        resume = begins.checkpoint()
    reads = resume is None or bool(config.adapter)
    prepared = setup(config, start_step=resume.step if resume else 0, run=run, weights="read" if reads else None)
    data = prepared.data
    if begins:
        begins.check(prepared.splits.fingerprint, data.num_steps)
    check_schedule(config.schedule, data.num_steps - extension.first_step(config))

    model = prepared.fingerprint(config.data.cache_dir, weights=reads) if is_main() else None
    fingerprint = prepared.splits.fingerprint
    attempt = run.attempt(settings, fingerprint, data.num_steps, is_main(), prepared.template, model, seen)
    # Trackers get the final report.
    with tracking() as trackers, reported(run.folder) as report, attempt as status:
        if is_main():
            if resume:
                put_aside(run.folder, skipped, resume.step)
            if resume and not (resume.path / manifest.NAME).exists():
                log(f"note: {resume.path} {OLD}")
            provenance.amend(run.folder, stores=stores(prepared.splits))
            manifest.write_sealed(run.folder / "data.json", prepared.splits.ledger)
            write_html(run.folder / "preview.html", prepared)
        begun = f", {f'extends {begins.run.folder}' if begins else 'resumed'} after step {data.start_step}"
        log(f"run {run.folder}: {data.num_steps} steps{begun if resume else ''}")
        log(f"data: {in_one_line(prepared.splits.ledger)}")
        for line in lines(config, data):
            log(line)
        file = MetricsFile(run.folder / "metrics.csv")
        file.resume(first := 0 if begins else data.start_step, resume.state.get("metrics") if resume else None)
        if other_callbacks:
            log(f"it was stopped early at step {data.start_step}, and continues {other_callbacks}")
        # Killed after its last step, only the export is left to do.
        if other_callbacks or begins or not (resume and resume.last):
            if is_main() and config.export:
                try_export(prepared, run)
            trackers += choose.start(config, run, file.metrics.rows)
            fit(
                config,
                prepared.source,
                data,
                checkpoints=run.checkpoints,
                resume=resume,
                extends=begins is not None,
                loggers=[file, *trackers],
                facts=facts(config, prepared),
                cluster=cluster,
                answers=answers.of(config, prepared, run, first),
            )
            if HydraConfig.get().mode is not RunMode.MULTIRUN:  # there the group is for the next setting, too
                disband()
        chosen, reason = at_the_end(run, config.checkpoint.export)
        status["exported"] = chosen.step
        if reason:
            status["stopped_early"] = reason
        lease.check()
        if is_main() and config.export:
            with signals.shielded():  # an export that has begun is finished
                export_run(run, chosen)
        if is_main() and config.checkpoint.drop_optimizer:
            for checkpoint in checkpoints.complete(run.checkpoints):
                drop_optimizer(checkpoint)
        report(status)
    if not is_main():
        return None
    summarise(run, file.metrics, said(run, chosen, file.metrics))
    return Result.read(run).last


def stores(splits: "Datasets") -> dict[str, str]:
    """The folder of each split's token store."""
    held_out = splits.val is not None and "validation" not in splits.fingerprint
    val = {} if splits.val is None or held_out else {"validation": splits.val.fingerprint}
    return {"train": splits.train.fingerprint, **val}


def repeat(config: DictConfig, run: Run, only: str = "") -> None:
    """Gives a finished run's figures to the W&B run that an agent's sweep has for the same settings, or to the tracker
    that hadn't got all of them: the loggers of which `_target_` ends with `only`."""
    from sft.training.trackers.choose import start, tracking

    config = config.copy()
    for name, logger in list((config.get("logger") or {}).items()):
        if isinstance(logger, DictConfig) and not str(logger.get("_target_")).endswith(only):
            with open_dict(config):
                del config.logger[name]
    with tracking() as trackers:
        trackers += start(config, run, Metrics.read(run.folder / "metrics.csv").rows)


def facts(config: DictConfig, prepared: "Prepared") -> dict[str, object]:
    """What each checkpoint tells of its run."""
    template = {"template": prepared.template} if prepared.template else {}
    callbacks = OmegaConf.to_container(config.callbacks, resolve=True) if config.get("callbacks") else {}
    return {
        "seed": config.seed,
        "stop_token_ids": prepared.stop_token_ids,
        "callbacks": without_secrets(callbacks),
        **template,
    }
