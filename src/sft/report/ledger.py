"""Which rows were trained, and which were lost or cut, by source and reason."""

from collections.abc import Mapping
from typing import Any

from sft.report.html import escaped, more, percent, table

NAMES = {"train": "training", "validation": "validation"}
MOST = 100  # sources


def ledger(splits: Mapping[str, Any]) -> str:
    """The table, and the first rows of each reason."""
    rows, lost_rows, notes = [], [], []
    for split, part in splits.items():
        if not isinstance(part, dict):
            continue
        for counts in part.get("sources") or []:
            num, tokens = int(counts.get("rows", 0)), int(counts.get("tokens", 0))
            supervised = int(counts.get("supervised_tokens", 0))
            reasons = counts.get("lost") or {}
            lost = ", ".join(f"{number:,} {_words(reason)}" for reason, number in reasons.items())
            name = escaped(counts.get("source", "?"))
            share = percent(counts.get("samples", 0) / num) if num else "–"
            rows.append(
                [
                    escaped(NAMES.get(split, split)),
                    name,
                    f"{num:,}",
                    f"{int(counts.get('samples', 0)):,} ({share})",
                    f"{tokens:,}",
                    percent(supervised / tokens) if tokens else "–",
                    escaped(lost) or "0",
                    f"{int(counts.get('truncated_prompt', 0)):,}",
                ]
            )
            for reason, examples in (counts.get("examples") or {}).items():
                for example in examples:
                    why = escaped(example.get("why") or "")
                    lost_rows.append([name, escaped(_words(reason)), escaped(example.get("place", "")), why])
            if unread := (counts.get("unread") or {}).get("columns"):
                notes.append(f"not read of {name}: {escaped(', '.join(unread))}")
        if part.get("of"):
            number, of = part.get("samples", 0), NAMES.get(str(part["of"]), part["of"])
            notes.append(f"{number:,} samples of {escaped(of)} are held out for validation")
        if also := part.get("also_in_training"):
            notes.append(f"<b>{also:,} validation samples are also in training</b>")
    if not rows:
        return ""
    header = ("split", "source", "rows", "samples", "tokens", "supervised", "lost", "prompts cut")
    left = len(rows) - MOST
    made = table(header, rows[:MOST], (2, 3, 4, 5, 7))
    if left > 0:
        notes.append(f"{left} more sources are in data.json")
    if notes:
        made += f"<p>{'; '.join(notes)}.</p>"
    if lost_rows:
        made += more(
            "The first rows that were lost or cut", table(("source", "reason", "where", "why"), lost_rows[:100])
        )
    return made


def _words(reason: str) -> str:
    return "prompt cut" if reason == "truncated_prompt" else str(reason).replace("_", " ")
