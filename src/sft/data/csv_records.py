"""CSV and TSV: where the records are, and what each holds. All fields are text."""

import csv
import io
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sft.data import record
from sft.data.files import SEPARATOR_OF
from sft.data.record import Layout, Record, lines, text_of
from sft.errors import BadRow, UserError


def header(file: Path, form: str, stream: BinaryIO, begin: int) -> Layout:
    first = next(split(stream, Layout(form, begin)), None)
    if first is None:
        raise UserError(f"{file}: it has no rows")
    try:
        columns = _fields(first.data or b"", form)
    except BadRow as error:
        raise UserError(f"{file}, line {first.line}: the header can't be read: {error}") from None
    for sign, word in (("\t", "tabs"), (";", "semicolons"), ("|", "bars"), (",", "commas")):
        if sign != SEPARATOR_OF[form] and len(columns) == 1 and sign in columns[0]:
            save = "let its name end in .tsv" if sign == "\t" else f"save it with {_WORDS[form]}"
            raise UserError(f"{file}: the file is separated by {word}: {save}")
    for column in columns:
        if not column.strip() or columns.count(column) > 1:
            what = f"two columns are called {column!r}" if column.strip() else "a column has no name"
            raise UserError(f"{file}, line {first.line}: {what}: correct the header")
    num_lines = (first.data or b"").count(b"\n")
    return Layout(form, first.end, first.line + num_lines, tuple(columns))


_WORDS = {"csv": "commas", "tsv": "tabs"}


def split(stream: BinaryIO, layout: Layout) -> Iterator[Record]:
    """A record ends with its line, or where the quotes are closed. Of one that is broken only its first line is a
    record, so that what follows can be read."""
    csv.field_size_limit(sys.maxsize)
    read = lines(stream, layout)
    waiting: deque[Record] = deque()  # lines that were read ahead

    while first := waiting.popleft() if waiting else next(read, None):
        if first.data is None or b'"' not in first.data:
            if first.data is None or first.data.strip(b"\r\n"):
                yield first
            continue
        taken: list[Record] = []

        def feed(first: Record = first, taken: list[Record] = taken) -> Iterator[str]:
            line: Record | None = first
            size = 0
            while line is not None and line.data is not None and size <= record.MAX_RECORD:
                taken.append(line)
                size += len(line.data)
                yield line.data.decode("latin-1")  # all that CSV means something by is ASCII
                line = waiting.popleft() if waiting else next(read, None)
            if line is not None:
                waiting.appendleft(line)

        try:
            next(csv.reader(feed(), delimiter=SEPARATOR_OF[layout.form], strict=True))
        except csv.Error:
            waiting.extendleft(reversed(taken[1:]))
            yield first
        else:
            data = b"".join(line.data or b"" for line in taken)
            yield Record(first.begin, taken[-1].end, first.line, data)


def _fields(data: bytes, form: str) -> list[str]:
    text = text_of(data)
    try:
        fields, *more = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATOR_OF[form], strict=True)
    except csv.Error as error:
        what = "a quote is opened and not closed" if "unexpected end" in str(error) else str(error).partition(" - ")[0]
        raise BadRow("broken_csv", f"broken {form.upper()}: {what}") from None
    if more:
        raise BadRow(
            "broken_csv", f"broken {form.upper()}: a carriage return in no quotes, and not at the end of a line"
        )
    return fields


def row_of(data: bytes, layout: Layout) -> dict[str, object]:
    fields = _fields(data, layout.form)
    if len(fields) != len(layout.columns):
        raise BadRow("number_of_fields", f"{len(fields)} fields, but the header has {len(layout.columns)}")
    return dict(zip(layout.columns, fields, strict=True))
