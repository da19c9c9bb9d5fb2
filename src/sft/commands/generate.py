"""sft generate: answer prompts with a run's model, its chat template and its stop token.

  sft generate run=gsm8k-1a2b3c4d --prompt "How many legs have 3 cats?"
  sft generate run=gsm8k-1a2b3c4d file=prompts.txt max_new_tokens=512 > answers.txt
      a file with one prompt a line
  echo "How many legs have 3 cats?" | sft generate run=gsm8k-1a2b3c4d temperature=0.7 seed=1

--prompt prints the response alone; a file or standard input gives JSON lines with `prompt` and `response`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import AutoTokenizer

from sft.data.conversation import RowFunction
from sft.data.prompt import served_ids
from sft.errors import UserError
from sft.export.folder import load_exported
from sft.runs.run import Run
from sft.training.prepare import quiet


def main(config: DictConfig) -> None:
    run = Run.find(config.run, config.runs_dir)
    folder = run.exported()
    prompts = read_prompts(config)
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, file=FILE, or lines on standard input")
    quiet()
    responses = answers(folder, instantiate(run.config["data"]["conversation"], _convert_="all"), prompts, config)
    for prompt, response in zip(prompts, responses, strict=True):
        line = json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False)
        print(line if config.prompt is None else response, flush=True)


def answers(folder: Path, row_function: RowFunction, prompts: list[str], config: DictConfig) -> Iterator[str]:
    """Responses of an exported model to prompts, in their order, without the stop token.

    The run's row function decides what the model sees of a prompt; `config` has the settings of conf/generate.yaml.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_exported(folder)
    token_ids = [served_ids(tokenizer, row_function, prompt) for prompt in prompts]
    sampling = {"do_sample": False}
    if config.temperature:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    torch.manual_seed(config.seed)
    pad, stops = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    for start in range(0, len(token_ids), config.batch_size):
        batch = token_ids[start : start + config.batch_size]
        longest = max(map(len, batch))
        # Padded on the left, where no new token has to follow it, and masked.
        padded = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in batch])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch])
        generated = model.generate(  # type: ignore[operator]  # of transformers' mixin
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=config.max_new_tokens,
            **sampling,
        )
        for new_ids in generated[:, longest:].tolist():
            end = next((at for at, token in enumerate(new_ids) if token in stops), len(new_ids))
            yield str(tokenizer.decode(new_ids[:end], skip_special_tokens=True))


def read_prompts(config: DictConfig) -> list[str]:
    if config.prompt is not None:
        return [str(config.prompt)]
    if config.file is not None:
        try:
            lines = Path(config.file).expanduser().read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"file={config.file} can't be read: {error}") from error
    else:
        if sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        lines = sys.stdin.read().splitlines()
    return [line for line in lines if line.strip()]
