"""The counts of rule 5: how many rows gave samples, and how many lost one, for which reason."""

from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from sft.data.mask import TRUNCATED
from sft.errors import UserError

NUM_EXAMPLES = 5  # rows named for each reason

ADVICE = {
    "overlong": "raise data.max_length or set data.overlong=truncate_prompt",
    "no_assistant_turn": "check data.conversation.roles",
    "no_supervised_token": "check the generation marks of the chat template",
}


class Counts(TypedDict):
    """The rows of one source, plain enough for JSON."""

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    rows_lost: int  # rows that lost a sample, for whatever reasons
    lost: dict[str, int]  # reason → rows
    truncated_prompt: int  # rows: cut, not lost
    examples: dict[str, list[int]]  # reason → the first rows


class SourceCounts(Counts):
    """`Counts` with the name of the source."""

    source: str


class SplitLedger(TypedDict, total=False):
    """The sources of a split; for a split held out of another, only its number of samples and that split's name."""

    sources: list[SourceCounts]
    samples: int
    of: str


Ledger = dict[str, SplitLedger]  # by split


def empty() -> Counts:
    return {
        "rows": 0,
        "samples": 0,
        "tokens": 0,
        "supervised_tokens": 0,
        "rows_lost": 0,
        "lost": {},
        "truncated_prompt": 0,
        "examples": {},
    }


def add(
    counts: Counts,
    num_rows: int,
    lengths: NDArray[np.int32],
    num_supervised: NDArray[np.int32],
    reasons: Sequence[tuple[int, frozenset[str]]],
) -> None:
    """Counts further rows of the source: their samples' tokens, all and supervised, both [num_samples], and (row, why
    samples of it were lost or cut)."""
    counts["rows"] += num_rows
    counts["samples"] += len(lengths)
    counts["tokens"] += int(lengths.sum(dtype=np.int64))
    counts["supervised_tokens"] += int(num_supervised.sum(dtype=np.int64))
    for row, why in reasons:
        counts["rows_lost"] += why != {TRUNCATED}
        counts[TRUNCATED] += TRUNCATED in why
        for reason in sorted(why):
            if reason != TRUNCATED:
                counts["lost"][reason] = counts["lost"].get(reason, 0) + 1
            examples = counts["examples"].setdefault(reason, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append(row)


def in_one_line(ledger: Ledger) -> str:
    """The samples of each split, and the rows lost in all."""
    sources = [counts for split in ledger.values() for counts in split.get("sources", [])]
    num_samples = Counter(
        {split: sum(counts["samples"] for counts in part.get("sources", [])) for split, part in ledger.items()}
    )
    held_out = ledger["held_out"]["samples"] if "held_out" in ledger else 0
    lost: Counter[str] = Counter()
    for counts in sources:
        lost.update(counts["lost"])
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in lost.most_common())
    num_rows, num_lost = (sum(counts[name] for counts in sources) for name in ("rows", "rows_lost"))
    num_cut = sum(counts["truncated_prompt"] for counts in sources)
    return (
        f"{num_samples['train'] - held_out:,} training samples, "
        + (f"{held_out:,} held out" if held_out else f"{num_samples['validation']:,}")
        + f" for validation; {num_lost:,} of {num_rows:,} rows lost"
        + (f": {reasons}" if reasons else "")
        + (f"; {num_cut:,} prompts cut" if num_cut else "")
    )


def check(sources: Sequence[SourceCounts], max_lost: float) -> None:
    """UserError if more than the share `max_lost` of all rows lost a sample, or nothing is left to train on."""
    num_rows = sum(counts["rows"] for counts in sources)
    num_lost = sum(counts["rows_lost"] for counts in sources)
    nothing_left = not any(counts["samples"] for counts in sources)
    if num_lost <= max_lost * num_rows and not nothing_left:
        return
    lost: Counter[str] = Counter()
    for counts in sources:
        lost.update(counts["lost"])
    [(reason, count)] = lost.most_common(1)
    example = next(counts for counts in sources if reason in counts["lost"])
    rows = ", ".join(map(str, example["examples"][reason]))
    advice = ADVICE.get(reason, "correct the rows")
    raise UserError(
        f"{num_lost} of {num_rows} rows lost, "
        + ("which leaves nothing to train on" if nothing_left else f"more than data.max_lost={max_lost:g} of them")
        + f"; {count} are {reason} (row {rows} of {example['source']}): {advice}"
        + ("" if nothing_left else ", or raise data.max_lost")
    )
