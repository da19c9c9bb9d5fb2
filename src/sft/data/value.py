"""A value of a row: as text, as the JSON that it holds, and as a message shows it."""

import json
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal

from sft.errors import BadRow


def as_text(value: object, where: str) -> str:
    """A text unchanged; null is none. A number or a truth value as JSON writes it, a date or a decimal by its own text.
    BadRow for everything else."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    if isinstance(value, Decimal | date | datetime | time | timedelta):
        return str(value)
    raise BadRow("not_a_text", f"{where} holds {kind(value)}, not a text")


def is_scalar(value: object) -> bool:
    """Whether `as_text` takes it."""
    return value is None or isinstance(value, str | bool | int | float | Decimal | date | datetime | time | timedelta)


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def parsed(value: object, what: str) -> object:
    """What a JSON text says; BadRow if it is none."""
    try:
        return json.loads(value)  # type: ignore[arg-type]  # TypeError unless it is a string
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("not_json", f"{what} is not JSON ({error}): {short(value)}") from None


def kind(value: object) -> str:
    return "nothing (null)" if value is None else f"{short(value)} ({type(value).__name__})"


def short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def counted(names: object) -> str:
    """Names in quotes, of many the first."""
    quoted = list(map(repr, names))  # type: ignore[call-overload]
    return ", ".join(quoted[:12]) + (f" and {len(quoted) - 12} more" if len(quoted) > 12 else "")
