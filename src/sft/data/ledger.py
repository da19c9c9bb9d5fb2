"""The counts of rule 5: how many rows gave samples, and how many lost one, for which reason."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NotRequired, TypedDict

from sft.data.mask import TRUNCATED
from sft.errors import UserError

if TYPE_CHECKING:
    from sft.data.samples import Samples

NUM_EXAMPLES = 5  # rows named for each reason
NUM_PLACES = 3  # of them in a message
NUM_REASONS = 3  # in a message
NUM_NAMES = 50  # of unread columns
MAX_NAMES = 1000  # of columns that are counted: a file may have another in each row
NUM_BEGINNING = 1000  # rows, after which a fault in all of them is taken for one of the settings
ORDERED: Final = ("overlong", "empty_prompt", "empty_response")  # reasons by which a file may well be sorted

ADVICE = {
    "overlong": "raise data.max_length or set data.overlong=truncate_prompt",
    "no_assistant_turn": "check data.conversation.roles",
    "unknown_role": "map it, data.conversation.roles={NAME: user}",
    "no_column": "set data.conversation to the columns that the rows have",
    "other_content": "leave the rows out: only text is trained",
    "preference_row": "keep the rows with good answers in a file without the column 'label'",
    "arguments_not_an_object": 'give a call\'s arguments as an object, or as its JSON once: {"town": "Graz"}',
    "no_supervised_token": "check the generation marks of the chat template",
    "broken_json": "correct or remove the lines",
    "broken_csv": "put quotes around a field with quotes in it, and double those",
    "number_of_fields": "put quotes around a field with separators or line ends in it",
    "not_utf8": "save the file as UTF-8",
    "not_an_object": 'write each row as a JSON object, {"column": value}',
    "row_function_failed": "correct the function of data.conversation",
}


class Example(TypedDict):
    """A row that was lost or cut."""

    row: int  # of its source
    place: str  # as a user would look it up
    why: str  # what exactly; "" where the reason says it all


class Unread(TypedDict):
    """What the rows have and nothing reads: each name with the number of rows that have it."""

    columns: dict[str, int]
    message_keys: dict[str, int]


class Counts(TypedDict):
    """The rows of one source, plain enough for JSON."""

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    rows_lost: int  # rows that lost a sample, for whatever reasons
    lost: dict[str, int]  # reason → rows
    truncated_prompt: int  # rows: cut, not lost
    examples: dict[str, list[Example]]  # reason → the first rows
    unread: Unread
    stops: dict[str, int]  # id of the token that ends a response → responses
    read: NotRequired[list[str]]  # columns, while the rows are being counted


class SourceCounts(Counts):
    """`Counts` with the name of the source."""

    source: str


class SplitLedger(TypedDict, total=False):
    """The sources of a split; for a split held out of another, only its number of samples and that split's name."""

    sources: list[SourceCounts]
    samples: int
    of: str
    sets: dict[str, int]  # samples of each validation set that has a name
    also_in_training: int  # samples of validation whose row occurs in training, too


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
        "unread": {"columns": {}, "message_keys": {}},
        "stops": {},
        "read": [],
    }


def add(counts: Counts, samples: "Samples") -> None:
    """Counts further rows of the source."""
    counts["rows"] += samples.num_rows
    counts["samples"] += len(samples.lengths)
    counts["tokens"] += int(samples.lengths.sum(dtype="int64"))
    counts["supervised_tokens"] += int(samples.num_supervised.sum(dtype="int64"))
    for lost in samples.lost:
        counts["rows_lost"] += lost.reasons.keys() != {TRUNCATED}
        counts[TRUNCATED] += TRUNCATED in lost.reasons
        for reason, why in sorted(lost.reasons.items()):
            if reason != TRUNCATED:
                _count(counts["lost"], {reason: 1})
            examples = counts["examples"].setdefault(reason, [])
            if len(examples) < NUM_EXAMPLES:
                examples.append({"row": lost.row, "place": lost.place, "why": why})
    counts["read"] = sorted({*counts["read"], *samples.read})
    _count(counts["unread"]["columns"], samples.has)
    _count(counts["unread"]["message_keys"], samples.unread_keys)
    _count(counts["stops"], {str(token): number for token, number in samples.stops.items()})


def _count(numbers: dict[str, int], more: "Counter[str] | dict[str, int]") -> None:
    for name, number in more.items():
        if name in numbers or len(numbers) < MAX_NAMES:
            numbers[name] = numbers.get(name, 0) + number


def finished(counts: Counts) -> Counts:
    """The counts once all rows are counted: of the columns, those that no row's reading asked for."""
    read = set(counts.get("read", []))
    columns = {name: number for name, number in counts["unread"]["columns"].items() if name not in read}
    unread: Unread = {
        "columns": dict(list(columns.items())[:NUM_NAMES]),
        "message_keys": dict(list(counts["unread"]["message_keys"].items())[:NUM_NAMES]),
    }
    done: Counts = {**counts, "unread": unread}
    done.pop("read", None)
    return done


def num_rows(counts: Iterable[Counts]) -> int:
    return sum(of_source["rows"] for of_source in counts)


def in_one_line(ledger: Ledger) -> str:
    """The samples of each split, the rows lost in all, and what is not read."""
    sources = [counts for split in ledger.values() for counts in split.get("sources", [])]
    num_samples = Counter(
        {split: sum(counts["samples"] for counts in part.get("sources", [])) for split, part in ledger.items()}
    )
    held_out = ledger["held_out"]["samples"] if "held_out" in ledger else 0
    lost = _lost(sources)
    reasons = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in lost.most_common())
    num_lost = sum(counts["rows_lost"] for counts in sources)
    num_cut = sum(counts["truncated_prompt"] for counts in sources)
    unread = not_read(ledger)
    return (
        f"{num_samples['train'] - held_out:,} training samples, "
        + (f"{held_out:,} held out" if held_out else f"{num_samples['validation']:,}")
        + f" for validation; {num_lost:,} of {num_rows(sources):,} rows lost"
        + (f": {reasons}" if reasons else "")
        + (f"; {num_cut:,} prompts cut" if num_cut else "")
        + (f"; {unread}" if unread else "")
    )


def not_read(ledger: Ledger) -> str:
    """The columns and the keys of messages that nothing reads, each named once; "" without any."""
    sources = [counts for split in ledger.values() for counts in split.get("sources", [])]
    columns = dict.fromkeys(name for counts in sources for name in counts["unread"]["columns"])
    keys = dict.fromkeys(name for counts in sources for name in counts["unread"]["message_keys"])
    parts = [f"columns {', '.join(columns)}"] if columns else []
    parts += [f"keys of messages {', '.join(keys)}"] if keys else []
    return f"not read: {'; '.join(parts)}" if parts else ""


def check_beginning(counts: SourceCounts) -> None:
    """UserError if all of the first rows are lost for one reason that no order of rows explains."""
    if counts["samples"] or counts["rows"] < NUM_BEGINNING or counts["rows_lost"] < counts["rows"]:
        return
    if len(counts["lost"]) == 1 and not counts["lost"].keys() & set(ORDERED):
        (reason,) = counts["lost"]
        raise UserError(f"all of the first {counts['rows']:,} rows are lost: {_described([counts], reason)}")


def check(sources: Sequence[SourceCounts], max_lost: float, overlong: str = "drop") -> None:
    """UserError if more than the share `max_lost` of all rows lost a sample, if nothing is left to train on, and, where
    `overlong` is "error", if any sample is too long: the commonest reasons, their first rows, and what to do."""
    if overlong == "error" and any("overlong" in counts["lost"] for counts in sources):
        raise UserError(f"data.overlong=error: {_described(sources, 'overlong')}")
    num_lost = sum(counts["rows_lost"] for counts in sources)
    nothing_left = not any(counts["samples"] for counts in sources)
    if num_lost <= max_lost * num_rows(sources) and not nothing_left:
        return
    lost = _lost(sources)
    described = [_described(sources, reason) for reason, _ in lost.most_common(NUM_REASONS)]
    others = len(lost) - len(described)
    raise UserError(
        f"{num_lost:,} of {num_rows(sources):,} rows lost, "
        + ("which leaves nothing to train on" if nothing_left else f"more than data.max_lost={max_lost:g} of them")
        + f": {'; '.join(described)}"
        + (f"; and {others} other reason{'s' * (others > 1)}" if others else "")
        + ("" if nothing_left else "; correct these rows or raise data.max_lost")
    )


def _lost(sources: Iterable[Counts]) -> Counter[str]:
    lost: Counter[str] = Counter()
    for counts in sources:
        lost.update(counts["lost"])
    return lost


def _described(sources: Sequence[SourceCounts], reason: str) -> str:
    """2 overlong (a.jsonl line 9, a.jsonl line 10: 3,000 tokens): raise data.max_length"""
    examples = [example for counts in sources for example in counts["examples"].get(reason, [])]
    count = sum(counts["lost"].get(reason, 0) for counts in sources)
    places = ", ".join(example["place"] for example in examples[:NUM_PLACES])
    why = next((f": {example['why']}" for example in examples if example["why"]), "")
    advice = ADVICE.get(reason, "" if why else "correct the rows")
    return f"{count:,} {reason} ({places}{', ...' if count > NUM_PLACES else ''}{why})" + (f": {advice}" * bool(advice))
