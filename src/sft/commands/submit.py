"""sft submit: check a training job for mistakes that would fail it after the wait, then queue it on a Slurm cluster.

  sft submit [options of sbatch] -- [settings of sft train]

  sft submit -- experiment=gsm8k strategy=deepspeed_zero3 trainer=gpu
      with the options in slurm/train.sbatch and slurm/site.sh
  sft submit --nodes=4 --partition=gpu --time=8:00:00 -- experiment=gsm8k strategy=deepspeed_zero3 trainer=gpu
      with any options of sbatch instead of those
  sft submit --dry-run ... -- ...
      makes all checks, prints the command, and queues nothing
  sft submit --rehearse ... -- ...
      runs sft rehearse with the same settings first, about a minute; queues the job only if that succeeds

The job runs in the project's folder: relative paths start there. Its log is in the run's folder. It trains on the nodes
and GPUs of its allocation, whatever trainer.num_nodes and trainer.devices say. When the job has ended, the same command
resumes the run.
"""

import shlex
import subprocess
import sys
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sft.cluster import partitions, slurm, storage, time_limit
from sft.cluster.sbatch import PROJECT, SCRIPT, Job, split
from sft.config.literal import instantiate
from sft.errors import UserError
from sft.runs import events, provenance
from sft.runs.files import check_writable
from sft.runs.plain import plain
from sft.runs.run import Run
from sft.runs.stopped import lifted
from sft.training import extension
from sft.training.compilation import is_compiled, offloads
from sft.training.settings import check
from sft.training.shape import settle_data


def main(config: DictConfig) -> None:
    flags, job = request(sys.argv[2:])
    slurm.check_installed()
    with chdir(PROJECT):
        _submit(config, job, dry_run="--dry-run" in flags, rehearse="--rehearse" in flags)


def request(arguments: list[str]) -> tuple[list[str], Job]:
    """This command's own flags, and the job of all other arguments."""
    options, _ = split(arguments)
    flags = [option for option in options if option in ("--dry-run", "--rehearse")]
    others = [option for option in options if option not in flags]
    return flags, Job.of([*others, *arguments[len(options) :]])


def _submit(config: DictConfig, job: Job, dry_run: bool, rehearse: bool) -> None:
    settle_data(config)  # here, where the job will read the data
    extension.settle(config)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    _, accumulation = check(config, here=False)
    notes = check_devices(job, config.trainer.accelerator)
    run = Run.of(settings)
    state = run.status.get("state", "new")
    if state == "finished" and not lifted(run, settings.get("callbacks") or {}):
        raise UserError(f"{run.folder} is finished: nothing to do (another run: run=NAME; anew: remove the folder)")
    notes += check_files(config, run)
    notes += check_first_batch(config, run)
    if offloads(config) and not is_compiled():  # not here: the processor of a login node may be another
        notes.append("the first node compiles DeepSpeed's AdamW for the host before it trains: about a minute, once")

    nodes = partitions.nodes()
    waits = partitions.check_resources(job, nodes)
    limit = partitions.limit(job, nodes)
    signal_time = job.signal_seconds_before_end
    time_limit.check_limit(limit, signal_time)
    notes += time_limit.note_on_saves(events.read(run.folder), signal_time)
    slurm.refuse_queued(run.folder)
    log = job.output or str(PROJECT / run.folder / "logs").replace("%", "%%") + "/%j.out"
    name = job.environment.get("SBATCH_JOB_NAME", run.folder.name)
    ours = [f"--chdir={PROJECT}", f"--job-name={name}", f"--output={log}"]
    command = ["sbatch", "--parsable", *ours, *job.options, str(PROJECT / SCRIPT), *job.settings]
    start = slurm.expected_start(command, job, waits=bool(waits))

    print(
        f"{run.folder} ({state}): {job.nodes} nodes × {job.tasks} ranks, {accumulation} micro-batches of "
        f"{config.micro_batch_size} each a step; {time_limit.clock(limit)} at most, saved {signal_time} s before"
    )
    for note in [*notes, *waits, *([f"Slurm would start it at {start}"] if start else [])]:
        print(f"note: {plain(note)}", flush=True)
    if rehearse:
        script = Path(sys.executable).with_name("sft")
        if subprocess.run([sys.executable, str(script), "rehearse", *job.overrides]).returncode:
            raise UserError("not submitted, since the rehearsal failed")
    if dry_run:
        environment = [f"{name}={value}" for name, value in job.environment.items()]
        print(shlex.join([*environment, *command]))
        return
    number = _queue(command, job, run)
    _print_commands(number, run, log.replace("%j", str(number)).replace("%%", "%"))
    if config.logger and "wandb" in config.logger:
        place = shlex.quote(str(run.folder))
        print(f"W&B: run {run.folder.name}; if the nodes are offline: wandb sync {place}/wandb/offline-run-*")


def check_devices(job: Job, accelerator: str) -> list[str]:
    """Returns notes; refuses a job whose tasks and GPUs differ in number."""
    notes = [
        f"{setting} gives way to {value}, the job's own"
        for name, value in (("num_nodes", job.nodes), ("devices", job.tasks))
        for setting in job.settings
        if setting.startswith(f"trainer.{name}=") and setting != f"trainer.{name}={value}"
    ]
    if accelerator == "cpu":
        unused = f"the job asks for {job.gpus} GPUs a node, and trainer=cpu uses none: --gpus-per-node=0"
        return [*notes, unused] if job.gpus else notes
    if (accelerator in ("gpu", "cuda") or job.gpus) and job.tasks != job.gpus:
        raise UserError(
            f"the job has {job.tasks} tasks and {job.gpus} GPUs a node, and each task is a rank that drives one: set "
            "--ntasks-per-node and --gpus-per-node to the same number"
        )
    return notes


def check_files(config: DictConfig, run: Run) -> list[str]:
    """Returns notes; refuses a missing model or missing data, and folders that can't be written or are too full."""
    from sft.data.rows import local_files

    model = instantiate(config.model, _convert_="all")
    model.check_files()
    instantiate(config.adapter, _convert_="all")
    training, validation = instantiate(config.data, _convert_="all").sources()
    paths = {"runs_dir": run.folder, "data.cache_dir": Path(config.data.cache_dir)}
    for setting, folder in paths.items():
        check_writable(folder, setting)
    notes = []
    for setting, source in (("model.path", model.path), ("model.tokenizer", model.tokenizer)):
        if source and Path(source).expanduser().exists():
            paths[setting] = Path(source).expanduser()
        elif source:
            notes += storage.check_hub(setting, source, "models")
    if model.chat_template:
        paths["model.chat_template"] = Path(model.chat_template).expanduser()
    for source in [*training, *validation]:
        if local_files(source):
            paths[f"data {source}"] = Path(source.path).expanduser()
        else:
            notes += storage.check_hub("data.path", source.path, "datasets")
    if "model.path" in paths and not config.adapter:
        storage.check_space(run.folder, paths["model.path"])
    return [*dict.fromkeys(notes), *storage.notes(paths)]


def check_first_batch(config: DictConfig, run: Run) -> list[str]:
    """Returns notes; refuses a job whose model, in small, doesn't compute what the settings ask of it. A run that has
    proven its model under these settings isn't asked again: it takes some 10 s of a processor."""
    proven = provenance.first_batch(run.folder)
    settings: Any = proven["where"]["settings"] if proven else {}
    if (settings.get("attention"), settings.get("isolate")) == (config.model.attention, config.model.isolate):
        return []
    from sft.proof.first_batch import prove_small  # with torch, which nothing above needs

    proof = prove_small(config)
    if proof is None:
        return ["no small form of the model runs here, so the job alone proves that it computes what it should"]
    if not proof.reason:
        return []
    return [f"{proof.reason} (found on a small form here; the job proves it again on its own device)"]


def _queue(command: list[str], job: Job, run: Run) -> int:
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)  # Slurm makes no folders for a log
    try:
        number = slurm.queue(command, job)
    except UserError:
        with suppress(OSError):  # folders that existed before aren't empty
            logs.rmdir()
            run.folder.rmdir()
        raise
    events.record(run.folder, "submit", job=number, restart=0, options=job.options, settings=job.settings)
    return number


def _print_commands(number: int, run: Run, log: str) -> None:
    """The commands for a queued job."""
    with suppress(ValueError):
        log = str(Path(log).relative_to(PROJECT))
    name = run.folder.name if run.folder.parent == Path("runs") else str(run.folder)
    print(f"job {number} is queued")
    for command, effect in (
        (f"sft watch {shlex.quote(name)}", "follow the run, from now on"),
        (f"squeue -j {number}", "its place in the queue"),
        (f"tail -F {shlex.quote(log)}", "its log, once it starts"),
        (f"scancel --signal=USR1 {number}", "save now, and requeue"),
        (f"scancel {number}", "end it; the same sft submit resumes the run later"),
    ):
        print(f"  {command:<{max(30, len(log) + 9)}} {effect}")
