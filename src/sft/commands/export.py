"""sft export: write a run's checkpoint as a Hugging Face folder, and prove that it is the trained model.

  sft export run=gsm8k-1a2b3c4d
      the last checkpoint, to runs/gsm8k-1a2b3c4d/export/ (sft train has done so unless export=false)
  sft export run=gsm8k-1a2b3c4d checkpoint=best output=models/gsm8k dtype=bfloat16 max_shard_size=2GB

  sft export run=gsm8k-1a2b3c4d merge=false output=models/adapter
      of a run with adapter=lora the adapter alone, for peft; by default it is merged into the base model

The folder holds safetensors, written one weight at a time, tokenizer, chat template, a generation config with the stop
token that was trained, and a model card. It is loaded again in a fresh process, where the log-probabilities of a few
samples must be those that the model in training gave: verified.json.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sft.checkpoint.checkpoint import Checkpoint, best, complete
from sft.errors import UserError
from sft.runs.run import Run


def main(config: Any) -> None:
    from sft.training.prepare import quiet

    quiet()
    run = Run.find(config.run, config.runs_dir)
    output = Path(config.output).expanduser() if config.output else run.export
    if config.output and output.exists():
        raise UserError(f"{output} exists: name another folder with output=, or remove it")
    export(run, _chosen(run, str(config.checkpoint)), output, config.dtype, config.merge, config.max_shard_size)


def export(
    run: Run,
    checkpoint: Checkpoint,
    output: Path | None = None,
    dtype: str | None = None,
    merge: bool | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Exports a checkpoint, `dtype` None keeping that of the weights; returns the folder.

    `merge`: an adapter into the base model, or not: by itself; None as the run says.
    """
    import torch

    from sft.export.folder import Layout, Read, publish, verify, write_folder
    from sft.export.merge import merged, write_adapter
    from sft.training.log import log
    from sft.training.prepare import model_source

    dtypes = {None: None, "float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise UserError(f"dtype={dtype} is unknown: set float32 or bfloat16")
    settings, state = run.config, checkpoint.state
    source = model_source(settings)
    if source.adapter:
        merge = source.adapter.merge if merge is None else merge
        source.adapter.check_merge(merge, "merge")
    elif merge is not None:
        raise UserError(f"merge={merge}: {run.folder} has no adapter, all of its weights were trained")
    output = output or run.export
    log(f"export {output}: writing, then reloading in a fresh process")
    # Beside its place until it is proven; a failed one stays there to be looked at.
    staging = output.with_name(f"{output.name}.unverified")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    layout: Layout = {name: (checkpoint.dtype(name), shape) for name, shape in checkpoint.shapes.items()}
    read: Read = checkpoint.tensor
    rest = source.load_tokenizer(), state["stop_token_ids"], model_card(run, checkpoint, merge)
    if merge is False:
        write_adapter(staging, source, layout, read, *rest, dtype=dtypes[dtype])
    else:
        if merge:
            layout, read = merged(source, layout, read)
        write_folder(staging, source, layout, read, *rest, dtype=dtypes[dtype], max_shard_size=max_shard_size, log=log)
    probes = json.loads((checkpoint.path / "probes.json").read_text())
    precision = "bf16-true" if dtype == "bfloat16" else settings["trainer"]["precision"]
    verdict = verify(staging, probes, str(precision), quantized=bool(source.adapter and source.adapter.quantize))
    publish(staging, output)
    differ = f"are within {verdict['largest_difference']:.1e} of the trained model's"
    if "rms_of_bf16" in verdict:
        differ = (
            f"differ from the trained model's by {verdict['rms_difference']:.1e} (root mean square), and bf16 alone "
            f"makes {verdict['rms_of_bf16']:.1e}"
        )
    log(f"export {output}: step {checkpoint.step}; the log-probabilities of {verdict['num_tokens']} tokens {differ}")
    return output


def model_card(run: Run, checkpoint: Checkpoint, merge: bool | None) -> str:
    """README.md of the exported folder: what it was made of, and how. `merge` is None without an adapter."""
    settings, state = run.config, checkpoint.state
    data = settings["data"]
    base = settings["model"]["path"]
    provenance = json.loads((run.folder / "provenance.json").read_text())
    sources = json.loads((run.folder / "data.json").read_text())["train"]["sources"]
    num_samples, num_supervised = (sum(each[key] for each in sources) for key in ("samples", "supervised_tokens"))
    header = [
        "---",
        f"library_name: {'peft' if merge is False else 'transformers'}",
        "pipeline_tag: text-generation",
    ]
    if base and not Path(base).exists():
        header.append(f"base_model: {base}")
    loss = "not measured" if state["val_loss"] is None else f"{state['val_loss']:.4f}"
    recipe = {
        "base model": base or "random weights",
        **({"adapter": _adapter_line(settings["adapter"], merge)} if merge is not None else {}),
        "data": f"{data['path']} ({num_samples:,} samples, {num_supervised:,} supervised tokens)",
        "loss on": "responses" if data["supervise"] == "response" else "all tokens",
        "global batch": f"{settings['global_batch_size']} packs of up to {data['max_length']} tokens",
        "optimizer": json.dumps({k: v for k, v in settings["optimizer"].items() if k != "_partial_"}),
        "schedule": json.dumps({k: v for k, v in settings["schedule"].items() if k != "_partial_"}),
        "precision": settings["trainer"]["precision"],
        "seed": settings["seed"],
        "step": f"{checkpoint.step} of {state['num_steps']}",
        "validation loss": loss,
        "commit": provenance["commit"],
    }
    rows = [f"| {name} | {value} |" for name, value in recipe.items()]
    title = [*header, "---", f"# {run.folder.name}", "", "Supervised fine-tuning by `sft`.", ""]
    table = ["| | |", "|---|---|", *rows, ""]
    whole = ["The whole configuration:", "", "```yaml", (run.folder / "config.yaml").read_text().rstrip(), "```", ""]
    return "\n".join([*title, *table, *whole])


def _adapter_line(settings: dict[str, Any], merge: bool) -> str:
    targets = settings["target_modules"]
    return (
        f"{'QLoRA' if settings['quantize'] else 'LoRA'} of rank {settings['r']}, alpha {settings['alpha']}, on "
        + (targets if isinstance(targets, str) else ", ".join(targets))
        + ("; merged into the weights" if merge else "; this folder holds it alone, for the base model")
    )


def _chosen(run: Run, which: str) -> Checkpoint:
    checkpoints = complete(run.checkpoints)
    if not checkpoints:
        raise UserError(f"{run.folder} has no checkpoint yet: let sft train go on")
    if which == "last":
        return checkpoints[-1]
    if which == "best":
        if (found := best(checkpoints)) is None:
            raise UserError(f"{run.folder} has no validation loss to choose by: set checkpoint=last")
        return found
    for checkpoint in checkpoints:
        if str(checkpoint.step) == which:
            return checkpoint
    steps = ", ".join(str(checkpoint.step) for checkpoint in checkpoints)
    raise UserError(f"checkpoint={which} is not there: set last, best or a step, one of {steps}")
