"""sft generate: answer prompts with a run's model, its chat template and its stop token.

  sft generate run=gsm8k-1a2b3c4d --prompt "How many legs have 3 cats?"
  sft generate run=gsm8k-1a2b3c4d file=prompts.txt max_new_tokens=512 > answers.txt
      one prompt a line
  echo "How many legs have 3 cats?" | sft generate run=gsm8k-1a2b3c4d temperature=0.7 seed=1

Several prompts give JSON lines with `prompt` and `response`, one prompt its response alone.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.errors import UserError
from sft.runs.run import Run


def main(config: Any) -> None:
    from sft.training.prepare import quiet

    run = Run.find(config.run, config.runs_dir)
    folder = run.exported()
    prompts = _prompts(config)
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, file=FILE, or lines on standard input")
    quiet()
    alone = config.prompt is not None
    for prompt, response in zip(
        prompts,
        answers(
            folder,
            run.config["data"],
            prompts,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=config.seed,
            batch_size=config.batch_size,
        ),
        strict=True,
    ):
        print(
            response if alone else json.dumps({"prompt": prompt, "response": response}, ensure_ascii=False),
            flush=True,
        )


def answers(
    folder: Path,
    data: Mapping[str, Any],
    prompts: list[str],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> Iterator[str]:
    """Responses of a model folder to prompts, in their order, without the stop token.

    `data` is a run's data configuration: its row function decides what a prompt looks like to the model.
    """
    import torch
    from hydra.utils import instantiate
    from transformers import AutoTokenizer

    from sft.data.prompt import served_ids
    from sft.model.loading import load_exported

    tokenizer = AutoTokenizer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = load_exported(folder)
    model.to(device).eval()
    make = instantiate(data["conversation"], _convert_="all")
    asked = [served_ids(tokenizer, make, prompt) for prompt in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    pad = model.generation_config.pad_token_id
    for start in range(0, len(asked), batch_size):
        batch = asked[start : start + batch_size]
        longest = max(map(len, batch))
        # Padded on the left, where no new token has to follow it, and masked.
        ids = torch.tensor([[pad] * (longest - len(each)) + each for each in batch])
        mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in batch])
        made = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            **sampling,
        )
        for row in made[:, longest:].tolist():
            stops = [at for at, token in enumerate(row) if token in _stops(model)]
            yield str(tokenizer.decode(row[: stops[0]] if stops else row, skip_special_tokens=True))


def _stops(model: Any) -> list[int]:
    stops = model.generation_config.eos_token_id
    return stops if isinstance(stops, list) else [stops]


def _prompts(config: Any) -> list[str]:
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
