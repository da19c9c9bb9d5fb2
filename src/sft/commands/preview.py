"""sft preview: show what sft train of the same settings would train, token by token.

  sft preview experiment=gsm8k data.path=../shared/data/gsm8k
      the first packs of the first step, supervised tokens marked; lengths, fill, and what became of each row
  sft preview ... preview.packs=5
  sft preview ... preview.dump=samples.jsonl
      every training sample as JSON: source, row, input_ids, labels

On a terminal supervised tokens are green and bold; elsewhere they stand between [[ and ]].
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sft.data.step_plan import check_division
from sft.training.prepare import Prepared


def main(config: Any) -> None:
    from rich.console import Console

    from sft.training.settings import world_size
    from sft.training.prepare import quiet, setup

    quiet()
    check_division(config.global_batch_size, world_size(config), config.micro_batch_size)
    prepared = setup(config)
    console = Console(highlight=False, soft_wrap=True)
    show(console, prepared, config.preview.packs, colour=console.is_terminal)
    if config.preview.dump:
        dump(Path(config.preview.dump).expanduser(), prepared)
        console.print(f"{len(prepared.splits.train)} samples written: {config.preview.dump}", markup=False)


def show(console: Any, prepared: Prepared, num_packs: int, colour: bool) -> None:
    """Prints figures, ledger and the first packs to a rich console."""
    from rich.table import Table
    from rich.text import Text

    data, train = prepared.data, prepared.splits.train
    plan = data.epoch(0)
    num_tokens, num_supervised = int(train.lengths.sum()), int(train.num_supervised.sum())
    figures = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    shortest, median, longest = np.quantile(train.lengths, [0, 0.5, 1])
    for name, value in {
        "samples": f"{len(train):,} training, {len(prepared.splits.val) if prepared.splits.val else 0:,} validation",
        "tokens": f"{num_tokens:,}, of which {num_supervised:,} ({num_supervised / num_tokens:.1%}) are supervised",
        "length": f"{shortest:.0f} to {longest:.0f} tokens, median {median:.0f}",
        "packs": f"{len(plan.packs):,} of up to {data.max_length} tokens, "
        f"{num_tokens / (len(plan.packs) * data.max_length):.2%} full",
        "steps": f"{data.num_steps:,}, of which {data.steps_per_epoch:,} an epoch, {data.global_batch_size} packs each",
    }.items():
        figures.add_row(name, value)
    console.print(figures)
    console.print(ledger_table(prepared.splits.ledger))
    for number, pack in enumerate(plan.packs[:num_packs]):
        tokens = int(train.lengths[pack].sum())
        console.print(
            Text(
                f"pack {number}: {len(pack)} samples, {tokens} tokens, {tokens / data.max_length:.1%} full",
                "bold",
            )
        )
        for index in pack.tolist():
            where = f"{train.source(index)} row {train.row(index)}"
            length, supervised = train.lengths[index], train.num_supervised[index]
            console.print(Text(f"  {where}: {length} tokens, {supervised} supervised", "dim"))
            console.print(marked(prepared.tokenizer, train[index], colour))
    legend = "green and bold" if colour else "between [[ and ]]"
    console.print(Text(f"supervised tokens are {legend}; all others are read and carry no loss", "dim"))


def marked(tokenizer: Any, sample: tuple[Any, Any], colour: bool) -> Any:
    """A sample's text with its supervised stretches marked."""
    from rich.text import Text

    from sft.data.mask import IGNORE

    text, (input_ids, labels) = Text(), sample
    start, supervised = 0, labels != IGNORE
    for end in range(1, len(input_ids) + 1):
        if end < len(input_ids) and supervised[end] == supervised[start]:
            continue
        piece = tokenizer.decode(input_ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        if supervised[start]:
            text.append(piece if colour else f"[[{piece}]]", "bold green")
        else:
            text.append(piece)
        start = end
    return text


def ledger_table(ledger: Any) -> Any:
    """What became of each row, by source."""
    from rich.table import Table

    table = Table("split", "source", "rows", "samples", "lost", "cut", box=None, padding=(0, 2, 0, 0))
    for split, part in ledger.items():
        for counts in part.get("sources", []):
            lost = ", ".join(f"{count} {reason}" for reason, count in counts["lost"].items()) or "0"
            table.add_row(
                split,
                counts["source"],
                f"{counts['rows']:,}",
                f"{counts['samples']:,}",
                lost,
                str(counts["truncated_prompt"]),
            )
    return table


def dump(path: Path, prepared: Prepared) -> None:
    """Writes each training sample as one JSON line."""
    train = prepared.splits.train
    with path.open("w") as file:
        for index in range(len(train)):
            input_ids, labels = train[index]
            line = {"source": train.source(index), "row": train.row(index)}
            line |= {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
            file.write(json.dumps(line) + "\n")


def write_html(path: Path, prepared: Prepared, num_packs: int = 2) -> None:
    """The preview as a page of the run folder."""
    import io

    from rich.console import Console

    console = Console(record=True, file=io.StringIO(), width=120, force_terminal=True, highlight=False)
    show(console, prepared, num_packs, colour=True)
    console.save_html(str(path))
