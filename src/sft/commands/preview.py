"""sft preview: show what sft train with the same settings would train, token by token.

  sft preview experiment=gsm8k
      the first packs of the first step with supervised tokens marked; lengths, fill, and rows used and lost
  sft preview ... preview.packs=5
      more packs
  sft preview ... check=true
      loads the model on this machine's device, too, and proves on a few samples that it computes what it should
  sft preview ... preview.dump=samples.jsonl
      also writes every training sample as JSON: source, row, input_ids, labels, and weights where there are any

Supervised tokens are green and bold on a terminal; elsewhere, or with NO_COLOR, they stand between [[ and ]].
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from sft.data.labels import IGNORE
from sft.data.ledger import Ledger, not_read
from sft.data.step_plan import DEFAULT_PACKS, check_division
from sft.model.found import Proof
from sft.runs.files import output_file
from sft.runs.plain import lines, plain
from sft.runs.run import Run
from sft.training.first_batch import prove_here
from sft.training.prepare import Prepared, quiet, setup
from sft.training.settings import world_size

WAYS = {"noise": "own, twice in a batch", "alone": "one at a time", "packed": "packed", "long": "packed, in a long row"}


def main(config: DictConfig) -> None:
    quiet()
    path = output_file(config.preview.dump, "preview.dump") if config.preview.dump else None
    check_division(config.global_batch_size or DEFAULT_PACKS, world_size(config), config.micro_batch_size)
    settings: Any = OmegaConf.to_container(config, resolve=True)
    config.evaluation.text = None  # nothing of it is shown
    prepared = setup(config, run=Run.named(settings))
    console = Console(highlight=False, soft_wrap=True)
    colour = console.color_system is not None and not console.no_color
    show(console, prepared, config.preview.packs, colour)
    if config.check:
        proof = prove_here(config, prepared.source, prepared.data)
        console.print(Text(f"first batch: {proof.said} ({proof.seconds:.1f} s)", "bold"))
        console.print(proof_table(proof))
    if path:
        dump(path, prepared)
        console.print(f"{len(prepared.splits.train)} samples written: {config.preview.dump}", markup=False)


def show(console: Console, prepared: Prepared, num_packs: int, colour: bool) -> None:
    """Prints figures, ledger and the first packs."""
    data, train = prepared.data, prepared.splits.train
    packs = data.epoch(0).packs
    console.print(figures(prepared))
    console.print(ledger_table(prepared.splits.ledger))
    for line in lost_rows(prepared.splits.ledger):
        console.print(Text(plain(line)))
    if unread := not_read(prepared.splits.ledger):
        console.print(Text(plain(unread)))
    for number, pack in enumerate(packs[:num_packs]):
        num_tokens = int(train.lengths[pack].sum())
        full = f"{num_tokens / data.max_length:.1%} full"
        console.print(Text(f"pack {number}: {len(pack)} samples, {num_tokens} tokens, {full}", "bold"))
        for index in pack.tolist():
            place = plain(f"{train.source(index)} row {train.row(index)}")
            length, num_supervised = train.lengths[index], train.num_supervised[index]
            weight = "" if train.weight_sums[index] == num_supervised else f", weight {train.weight_sums[index]:g}"
            console.print(Text(f"  {place}: {length} tokens, {num_supervised} supervised{weight}", "dim"))
            console.print(marked(prepared.tokenizer, *train[index], colour))
    mark = "green and bold" if colour else "between [[ and ]]"
    console.print(Text(f"supervised tokens are {mark}; all others are read and carry no loss", "dim"))


def figures(prepared: Prepared) -> Table:
    """Numbers of samples, tokens, packs and steps."""
    data, train, val = prepared.data, prepared.splits.train, prepared.splits.val
    num_packs = len(data.epoch(0).packs)
    num_tokens, num_supervised = int(train.lengths.sum()), int(train.num_supervised.sum())
    shortest, median, longest = np.quantile(train.lengths, [0, 0.5, 1])
    full = f"{num_tokens / (num_packs * data.pack_length):.2%} full"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("samples", f"{len(train):,} training, {len(val) if val else 0:,} validation")
    table.add_row(
        "tokens", f"{num_tokens:,}, {num_supervised:,} ({num_supervised / num_tokens:.1%}) of them supervised"
    )
    table.add_row("length", f"{shortest:.0f} to {longest:.0f} tokens, median {median:.0f}")
    table.add_row("packs", f"{num_packs:,} of up to {data.pack_length} tokens, {full}")
    table.add_row("steps", f"{data.num_steps:,} of {data.global_batch_size} packs, {data.steps_per_epoch:,} an epoch")
    return table


def proof_table(proof: Proof) -> Table:
    """How far each way of computing is from the model's own attention on one sample at a time."""
    heads = ("difference", "log p", "tolerated", "gradients", "tolerated", "leak")
    table = Table(*heads, box=None, padding=(0, 2, 0, 0))
    for way, found in proof.differences.items():
        numbers = [found.log_prob, found.tolerated_log_prob, found.gradient, found.tolerated_gradient]
        cells = [f"{number:.1e}" for number in [*numbers, max(found.reach, found.leak)]]
        if way == "noise":
            cells[1] = cells[3] = "-"
        table.add_row(WAYS[way], *(["-"] * 4 + [Text(plain(found.error))] if found.error else cells))
    return table


def marked(
    tokenizer: PreTrainedTokenizerFast, input_ids: NDArray[np.int32], labels: NDArray[np.int32], colour: bool
) -> Text:
    """A sample's text with its supervised stretches marked."""
    text, supervised = Text(), labels != IGNORE
    borders = np.flatnonzero(supervised[1:] != supervised[:-1]) + 1
    for start, end in zip([0, *borders], [*borders, len(input_ids)], strict=True):
        piece = lines(str(tokenizer.decode(input_ids[start:end].tolist(), clean_up_tokenization_spaces=False)))
        if supervised[start]:
            text.append(piece if colour else f"[[{piece}]]", "bold green")
        else:
            text.append(piece)
    return text


def ledger_table(ledger: Ledger) -> Table:
    """Rows read, used and lost, by source."""
    table = Table("split", "source", "rows", "samples", "lost", "cut", box=None, padding=(0, 2, 0, 0))
    for split, part in ledger.items():
        for counts in part.get("sources", []):
            lost = ", ".join(f"{count} {reason}" for reason, count in counts["lost"].items()) or "0"
            numbers = f"{counts['rows']:,}", f"{counts['samples']:,}", lost, str(counts["truncated_prompt"])
            table.add_row(split, Text(plain(counts["source"])), *map(Text, numbers))
    return table


def lost_rows(ledger: Ledger) -> list[str]:
    """A line for each reason and source: the first places, and what exactly was wrong there."""
    return [
        f"{reason}: {', '.join(example['place'] for example in examples)}" + (f": {why}" if why else "")
        for part in ledger.values()
        for counts in part.get("sources", [])
        for reason, examples in counts["examples"].items()
        for why in [next((example["why"] for example in examples if example["why"]), "")]
    ]


def dump(path: Path, prepared: Prepared) -> None:
    """Writes each training sample as one JSON line."""
    train = prepared.splits.train
    with path.open("w") as file:
        for index in range(len(train)):
            input_ids, labels = train[index]
            line = {"source": train.source(index), "row": train.row(index)}
            line |= {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
            if (weights := train.weights(index)) is not None:
                line["weights"] = weights.tolist()
            file.write(json.dumps(line) + "\n")


def write_html(path: Path, prepared: Prepared, num_packs: int = 2) -> None:
    """The preview as a page of the run folder."""
    console = Console(record=True, file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    show(console, prepared, num_packs, colour=True)
    console.save_html(str(path))
