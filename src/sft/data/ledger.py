"""What became of every row: how many gave samples, and how many lost one, for which reason."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sft.data.mask import TRUNCATED
from sft.errors import UserError

NUM_EXAMPLES = 5  # rows named for each reason

ADVICE = {
    "overlong": "raise data.max_length or set data.overlong=truncate_prompt",
    "no_assistant_turn": "check data.conversation.roles",
    "no_supervised_token": "check the generation marks of the chat template",
}


def empty() -> dict[str, Any]:
    """The counts of a source, plain enough for JSON."""
    return {
        "rows": 0,
        "samples": 0,
        "tokens": 0,
        "supervised_tokens": 0,
        "rows_lost": 0,  # rows that lost a sample, for whatever reasons
        "lost": {},  # reason → rows
        TRUNCATED: 0,  # rows: cut, not lost
        "examples": {},  # reason → the first rows
    }


def add(
    counts: dict[str, Any],
    num_rows: int,
    arrays: Mapping[str, np.ndarray],
    reasons: Sequence[tuple[int, frozenset[str]]],
) -> None:
    """Count some more rows of the source: their samples' arrays, and (row, why samples of it were lost or
    cut)."""
    counts["rows"] += num_rows
    counts["samples"] += len(arrays["lengths"])
    counts["tokens"] += len(arrays["input_ids"])
    counts["supervised_tokens"] += int(arrays["num_supervised"].sum(dtype=np.int64))
    for row, why in reasons:
        counts["rows_lost"] += why != {TRUNCATED}
        counts[TRUNCATED] += TRUNCATED in why
        for reason in sorted(why):
            if reason != TRUNCATED:
                counts["lost"][reason] = counts["lost"].get(reason, 0) + 1
            examples = counts["examples"].setdefault(reason, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append(row)


def check(sources: Sequence[Mapping[str, Any]], max_lost: float) -> None:
    """UserError where more than the share `max_lost` of all rows lost a sample, or nothing is left to train
    on.

    Takes the counts of each source, with its name as `source`.
    """
    num_rows = sum(counts["rows"] for counts in sources)
    num_lost = sum(counts["rows_lost"] for counts in sources)
    nothing_left = not any(counts["samples"] for counts in sources)
    if num_lost <= max_lost * num_rows and not nothing_left:
        return
    lost: Counter[str] = Counter()
    for counts in sources:
        lost.update(counts["lost"])
    [(reason, count)] = lost.most_common(1)
    where = next(counts for counts in sources if reason in counts["lost"])
    rows = ", ".join(map(str, where["examples"][reason]))
    advice = ADVICE.get(reason, "mend the rows")
    raise UserError(
        f"{num_lost} of {num_rows} rows lost, "
        + ("which leaves nothing to train on" if nothing_left else f"more than data.max_lost={max_lost:g} of them")
        + f"; {count} are {reason} (row {rows} of {where['source']}): {advice}"
        + ("" if nothing_left else ", or raise data.max_lost")
    )
