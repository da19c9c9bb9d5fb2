"""sft export: write a run's checkpoint as a Hugging Face folder, and prove that it is the trained model.

  sft export run=gsm8k-1a2b3c4d
      the last checkpoint, to runs/gsm8k-1a2b3c4d/export/ (sft train does so itself unless export=false)
  sft export run=gsm8k-1a2b3c4d checkpoint=best output=models/gsm8k dtype=bfloat16 max_shard_size=2GB
      the checkpoint with the lowest validation loss, in bf16
  sft export run=gsm8k-1a2b3c4d weights=average output=models/average
      the average of the weights, of a run with averaging=ema or averaging=swa
  sft export run=gsm8k-1a2b3c4d merge=false output=models/adapter
      only the adapter, for peft, of a run with adapter=lora; by default it is merged into the base model

The folder holds safetensors, written one weight at a time, the tokenizer, the chat template, a generation config with
the trained stop token, and a model card. A fresh process loads it again and compares the log-probabilities of a few
samples with those that the model had in training: verified.json.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from transformers import AutoConfig, AutoTokenizer

from sft.checkpoint.checkpoint import Checkpoint, best, complete, latest, measured_best
from sft.config.literal import literal
from sft.errors import UserError, disk_is_full
from sft.export.folder import Read, Specs, empty_model, generation_config, verify, write_model
from sft.export.merge import adapter_config, completed, merged, write_adapter
from sft.export.processor import copy_files
from sft.runs import computation, config_file, manifest, provenance, saved
from sft.runs.files import check_writable, fsync
from sft.runs.identity import TODAY, Config
from sft.runs.manifest import Damaged
from sft.runs.metrics_file import Metrics
from sft.runs.plain import plain
from sft.runs.run import Run
from sft.training.log import log
from sft.training.prepare import Prepared, check_model, model_source, quiet


def main(config: DictConfig) -> None:
    quiet()
    run = Run.find(config.run, config.runs_dir)
    output = Path(config.output).expanduser() if config.output else run.export
    if config.output and output.exists():
        raise UserError(f"{output} exists: name another folder with output=, or remove it")
    if config.output:
        check_writable(output, "output")
    checkpoint = choose(run, str(config.checkpoint))
    average = None if config.weights is None else config.weights == "average"
    export_run(run, checkpoint, output, config.dtype, config.merge, config.max_shard_size, average)


def export_run(
    run: Run,
    checkpoint: Checkpoint,
    output: Path | None = None,
    dtype: str | None = None,
    merge: bool | None = None,
    max_shard_size: int | str = "5GB",
    average: bool | None = None,
) -> None:
    """Exports a checkpoint; `dtype` None keeps that of the weights.

    `merge`: whether an adapter is merged into the base model; `average`: whether the average of the weights is exported
    in their place; None as the run says.
    """
    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    settings = run.config
    source = model_source(literal(settings), run)
    tokenizer = source.load_tokenizer()
    check_model(run, source, weights=source.adapter is not None, template=str(tokenizer.chat_template or ""))
    if source.adapter:
        merge = source.adapter.merge if merge is None else merge
        source.adapter.check_merge(merge, "merge")
        if not merge and source.new_ids:
            raise UserError("merge=false: the base has no rows for the tokens of model.add_tokens: set merge=true")
    elif merge is not None:
        raise UserError(f"merge={merge}: {run.folder} has no adapter, all of its weights were trained")
    if wrong := checkpoint.faults():  # its probes would prove what is damaged
        raise Damaged(wrong[0], saved.ADVICE)
    output = output or run.export
    log(f"export {output}: writing, then reloading in a fresh process")
    # Kept beside its place until it is proven; a failed one stays there for inspection.
    staging = output.with_name(f"{output.name}.unverified")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    specs: Specs = {name: (checkpoint.dtype(name), shape) for name, shape in checkpoint.shapes.items()}
    if average is None:
        average = bool(checkpoint.state.get("exports_average"))
        if average and not checkpoint.has_average:
            log(f"the average of the weights has not begun at step {checkpoint.step}: the weights are exported")
            average = False
    if average and not checkpoint.has_average:
        raise UserError(f"{checkpoint.path} holds no average of the weights: set weights=trained, or train with one")
    read: Read = partial(checkpoint.tensor, average=average)
    generation = generation_config(source, tokenizer, checkpoint.state["stop_token_ids"], log)
    if merge is False:
        write_adapter(staging, source, specs, read, dtypes[dtype])
    else:
        if merge:
            held = torch.bfloat16 if settings["trainer"]["precision"] == "bf16-true" else torch.float32
            specs, read = merged(source, specs, read, held)
        elif source.keeps_base(source.load_config()):
            specs, read = completed(source, specs, read)
        write_model(
            staging, source, specs, read, generation, dtype=dtypes[dtype], max_shard_size=max_shard_size, log=log
        )
    generation.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    copy_files(source, staging)
    (staging / "README.md").write_text(
        model_card(run, checkpoint.step, checkpoint.state, merge, which(run, checkpoint), average)
    )
    probes = json.loads((checkpoint.path / f"probes{'-average' if average else ''}.json").read_text())
    precision = "bf16-true" if dtype == "bfloat16" else settings["trainer"]["precision"]
    quantized = bool(source.adapter and source.adapter.quantize)
    verdict = verify(
        staging,
        probes,
        str(precision),
        quantized=quantized,
        step=checkpoint.step,
        trust_remote_code=source.trust_remote_code,
    )
    publish(staging, output)
    log(
        f"export {output}: step {checkpoint.step}; the log-probabilities of {verdict['num_tokens']} tokens differ from "
        f"the trained model's by {verdict[verdict['compared']]:.1e} (tolerance {verdict['tolerance']:.1e})"
    )


def publish(staging: Path, output: Path) -> None:
    """Puts a proven export in its place, with a manifest of all but its model card, which its user may edit."""
    files = [path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file()]
    for name in files:
        fsync(staging / name)
    manifest.write(staging, manifest.entries(staging, [name for name in files if name != "README.md"]))
    replaced = output.with_name(f"{output.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        output.rename(replaced)
    staging.rename(output)
    fsync(output.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def try_export(prepared: Prepared, run: Run | None = None) -> None:
    """Writes all of an export that needs no trained weights to a temporary folder and loads it, so that a fault is
    found before training. The model card is left out without a `run`. UserError for a fault."""
    source, tokenizer = prepared.source, prepared.tokenizer
    merge = source.adapter.merge if source.adapter else None
    trust = {"trust_remote_code": source.trust_remote_code}
    generation = generation_config(source, tokenizer, prepared.stop_token_ids, log)
    with tempfile.TemporaryDirectory(prefix="sft-export-") as folder:
        with _tried("tokenizer", source.tokenizer or source.path):
            tokenizer.save_pretrained(folder)
            AutoTokenizer.from_pretrained(folder, **trust)  # as `verify` does: without asking
        with _tried("adapter's configuration" if merge is False else "model's configuration", source.path):
            generation.save_pretrained(folder)
            if merge is False:
                adapter_config(source).save_pretrained(folder)
                AutoConfig.from_pretrained(str(source.base), revision=source.base_revision or "main", **trust)
            else:
                model = empty_model(source)
                model.generation_config = generation
                model.save_pretrained(folder, state_dict={})
                AutoConfig.from_pretrained(folder, **trust)
    if run is not None:
        with _tried("model card", None):
            model_card(
                run, 0, {"num_steps": prepared.data.num_steps, "val_loss": None, "template": prepared.template}, merge
            )


@contextmanager
def _tried(part: str, of: str | None) -> Iterator[None]:
    """A fault of a part of the export as a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries and models' own code may raise anything
        if disk_is_full(error):
            raise
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(
            f"the run could not be exported after training, because the {part}{f' of {of}' if of else ''} can't be "
            f"saved and loaded again ({message}): correct it, or set export=false to train without an export"
        ) from error


def model_card(
    run: Run, step: int, state: Mapping[str, object], merge: bool | None, place: str = "", average: bool = False
) -> str:
    """README.md of the exported folder: base model, data and settings. `state` is a checkpoint's; `merge` is None
    without an adapter; `place`: whether the step is the best or the last; `average`: the weights are an average."""
    settings, val_loss = run.config, state["val_loss_average" if average else "val_loss"]
    template: Mapping[str, object] = state.get("template") or {}  # type: ignore[assignment]
    data = settings["data"]
    base = settings["model"]["path"]
    recorded: Any = provenance.recorded(run.folder)
    sources = _ledger(run)["train"]["sources"]
    num_samples = sum(source["samples"] for source in sources)
    num_supervised = sum(source["supervised_tokens"] for source in sources)
    loss = "not measured" if val_loss is None else f"{val_loss:.4f}"
    recipe = {
        "base model": base or "random weights",
        **({"adapter": _adapter_line(settings["adapter"], merge)} if merge is not None else {}),
        "data": f"{data['path']} ({num_samples:,} samples, {num_supervised:,} supervised tokens)",
        "loss on": "responses" if data["supervise"] == "response" else "all tokens",
        "global batch": f"{settings['global_batch_size'] or 'up to 16'} packs of up to {data['max_length']} tokens",
        "optimizer": json.dumps({k: v for k, v in settings["optimizer"].items() if k != "_partial_"}),
        "schedule": json.dumps({k: v for k, v in settings["schedule"].items() if k != "_partial_"}),
        **({"chat template's arguments": _arguments_line(template)} if template else {}),
        "precision": settings["trainer"]["precision"],
        "seed": settings["seed"],
        "step": f"{step} of {state['num_steps']}{place and f', {place}'}",
        **({"weights": f"an average of the steps' ({json.dumps(settings['averaging'])})"} if average else {}),
        "validation loss": loss,
        **({"first batch": recorded["first_batch"]["said"]} if "first_batch" in recorded else {}),
        **({"code": recorded["code"]} if "code" in recorded else {}),
        "commit": recorded.get("commit"),
        **computation.history(run.folder, step),
    }
    lines = ["---", f"library_name: {'peft' if merge is False else 'transformers'}", "pipeline_tag: text-generation"]
    if base and not Path(base).exists():
        lines.append(f"base_model: {json.dumps(base) if not base.isprintable() else base}")
    lines += ["---", f"# {run.folder.name}", "", "Supervised fine-tuning by `sft`.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in recipe.items()]
    configuration = config_file.text(run.folder).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", configuration)), default=0))
    lines += ["", "The whole configuration:", "", f"{fence}yaml", configuration, fence, ""]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """Of a Markdown table: one line, whatever a path or an argument holds."""
    return re.sub(r"([|<])", r"\\\1", plain(str(value)))


def _ledger(run: Run) -> Any:
    """The rows that were used and lost."""
    try:
        return manifest.read_sealed(run.folder / "data.json", "the next start of sft train writes it again")
    except FileNotFoundError:
        raise UserError(f"{run.folder / 'data.json'} is missing: put back a copy") from None


def _arguments_line(template: Mapping[str, object]) -> str:
    """What the chat template was rendered with, for whoever serves the model."""
    written = {name: json.dumps(value) for name, value in template.items() if name != TODAY}
    day = f"the date that it writes was {template[TODAY]}" if TODAY in template else ""
    return "; ".join(filter(None, [", ".join(f"{name}={value}" for name, value in written.items()), day]))


def _adapter_line(settings: Config, merge: bool) -> str:
    targets = settings["target_modules"]
    return (
        f"{'QLoRA' if settings['quantize'] else 'LoRA'} of rank {settings['r']}, alpha {settings['alpha']}, on "
        + (targets if isinstance(targets, str) else ", ".join(targets))
        + ("; merged into the weights" if merge else "; this folder holds only the adapter")
    )


def at_the_end(run: Run, which: str | None) -> tuple[Checkpoint, str | None]:
    """The checkpoint that a run which has ended exports, and why it ended early, if it did. `which`: `best` or `last`;
    None: the best where a callback stops early by a validation loss, else the last. UserError where it has not ended.
    """
    last = latest(run.checkpoints)
    if last is None or not last.last:
        raise UserError(f"{run.folder} has not reached its last step: the same command resumes it")
    default = "best" if last.state.get("stops_early") and best(complete(run.checkpoints)) else "last"
    return choose(run, which or default), last.state.get("stopped_early")


def which(run: Run, checkpoint: Checkpoint) -> str:
    """Whether a checkpoint is the best, the last, both or, empty, neither."""
    checkpoints = complete(run.checkpoints)
    measured = measured_best(checkpoints[-1], checkpoints)
    names = {"the best": measured and measured["step"], "the last": checkpoints[-1].step}
    return " and ".join(name for name, step in names.items() if step == checkpoint.step)


def said(run: Run, chosen: Checkpoint, metrics: Metrics) -> str:
    """Which step a run gives, with which validation loss."""
    checkpoints = complete(run.checkpoints)
    last, measured = checkpoints[-1], measured_best(checkpoints[-1], checkpoints)
    if measured is None:
        return f"step {chosen.step}, the last"

    def loss(checkpoint: Checkpoint) -> str:
        return "not measured" if checkpoint.loss is None else f"{checkpoint.loss:.4f}"

    text = f"step {chosen.step}, {which(run, chosen)}: validation loss {loss(chosen)}"
    if chosen.step != last.step:
        text += f" (the last, step {last.step}: {loss(last)})"
    elif measured["step"] != last.step:
        text += f" (the best, step {measured['step']}: {measured['val_loss']:.4f}; checkpoint.export=best exports it)"
    average = chosen.state.get("val_loss_average")
    if chosen.state.get("exports_average"):
        text = text.replace("validation loss", "validation loss of the average")
    elif average is not None:
        text += f"; {average:.4f} with the average of the weights, which sft export weights=average exports"
    before = metrics.first("val/loss")  # training
    if before < measured["val_loss"]:
        text += f"; the model was better before training: {before:.4f}"
    return text


def choose(run: Run, which: str) -> Checkpoint:
    """The run's checkpoint `last`, `best` or of a step."""
    run.check_step(which)
    asked = max(run.steps) if which == "last" else int(which) if which != "best" else None
    if asked is not None and (wrong := saved.faults(saved.folders(run.checkpoints)[asked], contents=False)):
        raise Damaged(wrong[0], saved.ADVICE)
    checkpoints = complete(run.checkpoints)
    if which == "last":
        return checkpoints[-1]
    if which == "best":
        if (lowest := best(checkpoints)) is None:
            raise UserError(f"{run.folder} has no validation loss to choose by: set checkpoint=last")
        measured = measured_best(checkpoints[-1], checkpoints)
        if measured and measured["step"] != lowest.step:
            raise UserError(
                f"the best of {run.folder} is step {measured['step']} with validation loss {measured['val_loss']:.4f}, "
                f"which was not saved (checkpoint.export=best saves it); the best that was is step {lowest.step}: set "
                f"checkpoint={lowest.step}"
            )
        return lowest
    return next(checkpoint for checkpoint in checkpoints if str(checkpoint.step) == which)
