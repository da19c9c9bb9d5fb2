"""A piece of rows → its samples, and what is to be counted of them. This is what a worker process does."""

import hashlib
import traceback
from collections import Counter
from collections.abc import ItemsView, Iterator, Sequence, ValuesView
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.data.conversation import Conversation, Empty, RowFunction
from sft.data.labels import IGNORE, Sample
from sft.data.mask import Tokenization, Tokenized
from sft.data.rows import Piece, Row
from sft.data.store import DTYPES
from sft.errors import BadRow, UserError

MAX_WHY = 200  # characters of what is said of a row


@dataclass(frozen=True)
class Work:
    """What a worker process needs, sent to it once."""

    row_function: RowFunction
    tokenization: Tokenization


@dataclass(frozen=True)
class Lost:
    """A row of which samples were lost or cut."""

    row: int  # of its source
    place: str
    reasons: dict[str, str]  # reason → what exactly


@dataclass
class Samples:
    """Those of a piece of rows, in row order, with all that the ledger counts."""

    num_rows: int
    lengths: NDArray[np.int32]
    num_supervised: NDArray[np.int32]
    columns: dict[str, bytes]  # of DTYPES, all but the offsets
    weights: bytes | None  # float32, of each token; None: 1 where it is supervised
    lost: list[Lost] = field(default_factory=list)
    has: Counter[str] = field(default_factory=Counter)  # column → rows that have it
    read: set[str] = field(default_factory=set)  # columns that the row function read
    unread_keys: Counter[str] = field(default_factory=Counter)  # key of a message that no template reads → rows
    stops: Counter[int] = field(default_factory=Counter)  # token that ends a response → responses


class Watched(dict[str, object]):
    """A row that remembers which of its columns were read: by name, or all by going through the values."""

    def __init__(self, row: Row, read: set[str]) -> None:
        super().__init__(row)
        self.read = read

    def __getitem__(self, column: str) -> object:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: object = None) -> object:
        self.read.add(column)
        return super().get(column, default)

    def pop(self, column: str, *default: object) -> object:
        self.read.add(column)
        return super().pop(column, *default)

    def items(self) -> ItemsView[str, object]:  # type: ignore[override]
        self.read.update(self)
        return super().items()

    def values(self) -> ValuesView[object]:  # type: ignore[override]
        self.read.update(self)
        return super().values()

    def __iter__(self) -> Iterator[str]:  # a method of our own, so that dict(row) and {**row} ask for each value
        return super().__iter__()

    def __or__(self, other: object) -> dict[str, object]:  # type: ignore[override]
        return dict(self) | other  # type: ignore[operator]

    def copy(self) -> dict[str, object]:
        return dict(self)

    def __reduce__(self) -> tuple[type[dict[str, object]], tuple[dict[str, object]]]:
        return dict, (dict(self),)


def samples_of(work: Work, piece: Piece, first: int) -> Samples:
    """The samples of a piece whose first row has number `first` in its source."""
    has: Counter[str] = Counter()
    read: set[str] = set()
    places, conversations = [], []
    for place, row in piece.rows():
        places.append(place)
        if not isinstance(row, BadRow):
            has.update(row.keys())
        conversations.append(row if isinstance(row, BadRow) else _conversation(work.row_function, row, read))
    samples = columns_of(first, _tokenized(work.tokenization, conversations, places))
    samples.has, samples.read = has, read
    for lost in samples.lost:
        lost.reasons.update({reason: _short(why) for reason, why in lost.reasons.items()})
    samples.lost = [Lost(lost.row, places[lost.row - first], lost.reasons) for lost in samples.lost]
    return samples


def _conversation(function: RowFunction, row: Row, read: set[str]) -> Conversation | Empty | BadRow:
    try:
        made = function(Watched(row, read))
    except BadRow as error:
        return error
    except UserError as error:
        return BadRow("bad_row", str(error))
    except MemoryError:
        raise
    except Exception as error:  # a function of the user's own
        frames = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
        where = next((f" ({file.name}, line {line})" for file, line in reversed(frames) if str(file) != __file__), "")
        return BadRow("row_function_failed", f"{type(error).__name__}: {error}{where}")
    if not isinstance(made, Conversation | Empty | BadRow):
        return BadRow("row_function_failed", f"it returned {type(made).__name__}, not a Conversation")
    return made


def _tokenized(
    tokenization: Tokenization, conversations: Sequence[Conversation | Empty | BadRow], places: Sequence[str]
) -> list[Tokenized]:
    try:
        return tokenization.batch(conversations)
    except (UserError, MemoryError):
        raise
    except Exception as error:
        error.add_note(f"in {places[0]} to {places[-1]}")
        raise


def columns_of(first: int, tokenized: Sequence[Tokenized]) -> Samples:
    """Those of rows from number `first` on, as the bytes of a store."""
    # Arrays from the start: a Python integer takes nine times the memory.
    ids, masks = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
    rows, content, lost = [], [], []
    stops: Counter[int] = Counter()
    unread: Counter[str] = Counter()
    samples: list[Sample] = []
    for number, made in enumerate(tokenized, first):
        digest = hashlib.blake2b(digest_size=8)
        for sample in made.samples:
            ids.append(np.array(sample.input_ids, np.int32))
            masks.append(np.array(sample.labels) != IGNORE)
            digest.update(len(sample.input_ids).to_bytes(8, "little") + ids[-1].tobytes())
        samples += made.samples
        rows += [number] * len(made.samples)
        content += [int.from_bytes(digest.digest(), "little")] * len(made.samples)
        stops.update(made.stops)
        unread.update(made.unread)
        if made.reasons:
            lost.append(Lost(number, "", dict(made.reasons)))
    lengths = np.array([len(mask) for mask in masks[1:]], np.int32)
    num_supervised = np.array([mask.sum() for mask in masks[1:]], np.int32)
    values = {
        "input_ids": np.concatenate(ids),
        "supervised": np.concatenate(masks),
        "lengths": lengths,
        "num_supervised": num_supervised,
        "rows": np.array(rows),
        "content": np.array(content, np.uint64),
    }
    bytes_of = {name: array.astype(DTYPES[name]).tobytes() for name, array in values.items()}
    weights = _weights(samples, masks[1:]) if any(sample.weights is not None for sample in samples) else None
    return Samples(
        len(tokenized), lengths, num_supervised, bytes_of, weights, lost=lost, unread_keys=unread, stops=stops
    )


def _weights(samples: Sequence[Sample], masks: Sequence[NDArray[np.bool_]]) -> bytes:
    """Those of all tokens, 0 where there is no loss."""
    parts = [
        np.where(mask, 1.0 if sample.weights is None else np.array(sample.weights), 0.0)
        for sample, mask in zip(samples, masks, strict=True)
    ]
    return np.concatenate(parts).astype(np.float32).tobytes()


def _short(why: str) -> str:
    one_line = " ".join(why.split())
    return one_line if len(one_line) <= MAX_WHY else one_line[: MAX_WHY - 3] + "..."
