"""sft score: log-probabilities of samples under a run's model, one JSON line for each sample.

  sft score run=gsm8k-1a2b3c4d
      the run's validation data, to standard output
  sft score run=gsm8k-1a2b3c4d data=new.jsonl output=scores.jsonl
      a file with the columns of the run's data, read in its shape

log_p_response = log Pr(y | x) = log_p_joint - log_p_prompt, in nats, the stop token included.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedModel

from sft.config.literal import instantiate, literal
from sft.data.batch import make_batch, to_device
from sft.data.labels import IGNORE
from sft.data.rows import first_rows
from sft.data.shape import NUM_ROWS
from sft.data.shapes import check_columns
from sft.data.step_plan import eval_plan
from sft.data.store import Store
from sft.errors import UserError
from sft.export.folder import load_exported
from sft.model.isolation import Isolation, use_attention
from sft.model.loss import head_is_plain_matrix, token_log_probs
from sft.runs import computation
from sft.runs.files import output_file
from sft.runs.run import Run
from sft.training.prepare import check_model, model_source, quiet, template_settings


def main(config: DictConfig) -> None:
    quiet()
    path = output_file(config.output, "output") if config.output else None
    run = Run.find(config.run, config.runs_dir)
    folder = run.exported()
    run.check_export()
    if (folder / "adapter_config.json").exists():  # nothing without its base
        check_model(run, model_source(literal(run.config), run), weights=True)
    settings = run.config
    data_config = instantiate(settings["data"], _convert_="all")
    if note := computation.note(run.folder, settings):
        print(note, file=sys.stderr)
    if config.path is not None:
        split = config.split or data_config.split
        data_config = replace(data_config, path=config.path, split=split, val_path=None, val_split=None, val_size=0)
        function, arguments = settings["data"]["conversation"]["_target_"], settings["data"]["conversation"]
        for source in data_config.sources()[0]:
            rows = first_rows(source, NUM_ROWS, cache_dir=Path(data_config.cache_dir))
            advice = f"rename them as in the run's data ({run.folder}/config.yaml, data.conversation)"
            check_columns(str(source), rows, function, arguments, advice)
    trusted = bool(settings["model"].get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    template = template_settings(settings["model"].get("template") or {}, tokenizer, run)
    splits = data_config.datasets(
        tokenizer, seed=settings["seed"], template=template, log=lambda line: print(line, file=sys.stderr)
    )
    samples = splits.train if config.path is not None else splits.val
    if samples is None:
        raise UserError(f"{run.folder} has no validation data: name what to score with data=")
    isolation = Isolation.recorded(run.folder)
    model = load_exported(folder, isolation.attention, trusted)
    opened = path.open("w") if path else nullcontext(sys.stdout)
    with opened as output:
        for line in scores(model, samples, data_config.max_length, isolation):
            print(json.dumps(line), file=output)
    if config.output:
        print(f"{len(samples)} samples scored: {config.output}")


def scores(
    model: PreTrainedModel, samples: Store, max_length: int, isolation: Isolation
) -> Iterator[dict[str, object]]:
    """The line of each sample, by a model whose samples are kept from one another in this way."""
    use_attention(model, isolation.attention)
    plain_head = head_is_plain_matrix(model)
    plan = eval_plan(samples.lengths, max_length=max_length, packing=False, micro_batch_size=16, world_size=1, rank=0)
    for indices in plan:
        batch = make_batch(samples, indices, 1)
        bounds, in_response = batch["cu_seqlens"].tolist(), batch["labels"][0] != IGNORE
        parts = isolation.parts(to_device(batch, model.device))
        log_probs = torch.cat([token_log_probs(model, part, plain_head=plain_head) for part in parts]).double().cpu()
        for index, start, end in zip(indices.tolist(), bounds[:-1], bounds[1:], strict=True):
            sample, response = log_probs[start:end], in_response[start:end]
            yield {
                "source": samples.source(index),
                "row": samples.row(index),
                "log_p_response": float(sample[response].sum()),
                "log_p_prompt": float(sample[~response].sum()),
                "log_p_joint": float(sample.sum()),
                "num_response_tokens": int(response.sum()),
            }
