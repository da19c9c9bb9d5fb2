"""Rows of token ids, made elsewhere → conversation."""

from collections.abc import Sequence

from sft.data.conversation import Conversation, Empty, Row, columns
from sft.data.value import is_list, kind
from sft.errors import BadRow

IGNORE = -100  # the label of a token that carries no loss
MASKS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask")  # names in use


def pretokenized(
    row: Row, *, column: str = "input_ids", labels: str | None = None, attention_mask: str = "attention_mask"
) -> Conversation | Empty:
    """Token ids with the label of each, which is the id itself (not that of the next token) or -100, or with a mask: 1
    for loss and 0 for none.

    `labels` names the column of either; null is `labels`, or else one of MASKS. Where `attention_mask` is 0 there is
    padding, which is left out.
    """
    ids = _numbers(row, column)
    name = labels or next((name for name in ("labels", *MASKS) if row.get(name) is not None), "labels")
    marks = _numbers(row, name, len(ids))
    if any(token < 0 for token in ids):
        raise BadRow("not_token_ids", f"column {column!r} holds {min(ids)}, which is no token id")
    if name in MASKS or (labels and set(marks) <= {0, 1} and marks != ids):
        if not set(marks) <= {0, 1}:
            raise BadRow("not_a_mask", f"column {name!r} holds {max(marks)}: a mask is 1 for loss and 0 for none")
        marks = [token if mark else IGNORE for token, mark in zip(ids, marks, strict=True)]
    for at, (token, label) in enumerate(zip(ids, marks, strict=True)):
        if label not in (token, IGNORE):
            raise BadRow(
                "not_labels",
                f"column {name!r} holds {label} at position {at}, where the token is {token}: a label is the token of "
                "its own position or -100",
            )
    if row.get(attention_mask) is not None:
        kept = _numbers(row, attention_mask, len(ids))
        if not set(kept) <= {0, 1}:
            raise BadRow("not_a_mask", f"column {attention_mask!r} holds {max(kept)}: a mask holds 1 and 0")
        ids = [token for token, keep in zip(ids, kept, strict=True) if keep]
        marks = [label for label, keep in zip(marks, kept, strict=True) if keep]
    if not ids:
        return Empty("empty_response")
    return Conversation(input_ids=ids, labels=marks)


def _numbers(row: Row, column: str, length: int | None = None) -> list[int]:
    """A column's list of whole numbers, as many as `length`."""
    if column not in row:
        raise BadRow("no_column", f"no column {column!r}: {columns(row)}")
    values = row[column]
    if not is_list(values) or not all(isinstance(value, bool | int) for value in values):  # type: ignore[attr-defined]
        raise BadRow("not_token_ids", f"column {column!r} holds {kind(values)}, not a list of whole numbers")
    assert isinstance(values, Sequence)
    if length is not None and len(values) != length:
        raise BadRow("lengths_differ", f"column {column!r} has {len(values)} numbers for {length} tokens")
    return list(map(int, values))
