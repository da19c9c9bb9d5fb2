"""sft generate: answer prompts with a run's model, its chat template and its stop token.

  sft generate run=gsm8k-1a2b3c4d --prompt "How many legs have 3 cats?"
  sft generate run=gsm8k-1a2b3c4d file=prompts.txt max_new_tokens=512 > answers.txt
      a file with one prompt a line
  sft generate run=gsm8k-1a2b3c4d file=test.jsonl > answers.jsonl
      rows (.jsonl, .json, .csv, .parquet) with the columns of the run's data, of which the answer may be missing
  echo "How many legs have 3 cats?" | sft generate run=gsm8k-1a2b3c4d temperature=0.7 seed=1

--prompt prints the response alone; a file or standard input gives JSON lines with `prompt` and `response`, and with
`reference` if the row has an answer. The prompt of a row of messages is all before the last assistant message.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.config.literal import instantiate, literal
from sft.data.conversation import Row, RowFunction
from sft.data.files import kind
from sft.data.prompt import prompt_column, served, served_ids, shown
from sft.data.rows import Source, all_rows
from sft.errors import BadRow, UserError
from sft.evaluation.generation import answer, decode
from sft.export.folder import load_exported
from sft.runs import computation
from sft.runs.files import input_file
from sft.runs.plain import lines as shown_lines
from sft.runs.run import Run
from sft.training.prepare import check_model, model_source, quiet, template_settings


def main(config: DictConfig) -> None:
    run = Run.find(config.run, config.runs_dir)
    folder = run.exported()
    run.check_export()
    if (folder / "adapter_config.json").exists():  # nothing without its base
        check_model(run, model_source(literal(run.config), run), weights=True)
    quiet()
    row_function = instantiate(run.config["data"]["conversation"], _convert_="all")
    if note := computation.note(run.folder, run.config):
        print(note, file=sys.stderr)
    asked = read(config, row_function)
    lines = list(known(asked, row_function, config.file))
    trusted = bool(run.config["model"].get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    template = template_settings(run.config["model"].get("template") or {}, tokenizer, run)
    token_ids = [served_ids(tokenizer, row_function, one, template) for one in asked]
    for line, response in zip(lines, answers(folder, tokenizer, token_ids, config, trusted), strict=True):
        made = json.dumps({"prompt": line.pop("prompt"), "response": response, **line}, ensure_ascii=False)
        text = made if config.prompt is None else response
        print(
            shown_lines(text) if sys.stdout.isatty() else text, flush=True
        )  # a file or a pipe gets what the model said


def known(asked: Sequence[Row | str], row_function: RowFunction, file: str | None) -> Iterator[dict[str, object]]:
    """`prompt` and, if there is one, `reference` of each line; UserError for a row that can't be answered."""
    for number, one in enumerate(asked):
        try:
            given, reference = served(row_function, one)
        except UserError as error:
            raise UserError(f"row {number} of {file}: {error}" if file else str(error)) from error
        text = one if isinstance(one, str) else shown(given)
        yield {"prompt": text} if reference is None else {"prompt": text, "reference": reference}


def answers(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    token_ids: list[list[int]],
    config: DictConfig,
    trust_remote_code: bool = False,
) -> Iterator[str]:
    """Responses of an exported model to the tokens of prompts, in their order, without the stop token.

    `config` has the settings of conf/generate.yaml.
    """
    model = load_exported(folder, trust_remote_code=trust_remote_code)
    sampling: dict[str, object] = {"do_sample": False}
    if config.temperature:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p}
    torch.manual_seed(config.seed)
    pad, stops = model.generation_config.pad_token_id, model.generation_config.eos_token_id
    for start in range(0, len(token_ids), config.batch_size):
        batch = token_ids[start : start + config.batch_size]
        for new_ids in answer(
            model, batch, max_new_tokens=config.max_new_tokens, pad=pad, stops=stops, sampling=sampling
        ):
            yield decode(tokenizer, new_ids, stops)


def read(config: DictConfig, row_function: RowFunction) -> Sequence[Row | str]:
    """The prompts, or the rows of a file that holds rows."""
    if config.prompt is not None:
        return [str(config.prompt)]
    if config.file is not None:
        path = input_file(config.file, "file")
        if kind(path) not in (None, "text"):
            return read_rows(path, row_function)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"file={config.file} can't be read: {error}") from error
    else:
        if sys.stdin.isatty():
            print("one prompt a line, then Ctrl-D:", file=sys.stderr)
        text = sys.stdin.read()
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts and config.file is not None:
        raise UserError(f"file={config.file} holds no prompt: it has one on each line")
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT, file=FILE, or lines on standard input")
    return prompts


def read_rows(path: Path, row_function: RowFunction) -> list[Row]:
    """The rows as training reads them; UserError without the column that it takes the prompt from."""
    rows: list[Row] = []
    for row in all_rows(Source(str(path))):
        if isinstance(row, BadRow):
            raise row
        rows.append(row)
    setting, column = prompt_column(row_function) or (None, None)
    if column is not None and column not in rows[0]:
        raise UserError(
            f"file={path} has no column {column!r}, only {', '.join(map(repr, rows[0]))}: rename the one with the "
            f"prompts, because the run was trained with data.conversation.{setting}={column}"
        )
    return rows
