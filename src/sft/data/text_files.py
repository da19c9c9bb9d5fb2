"""Files of JSON, CSV, TSV and plain text → rows, verbatim: nothing is guessed, converted, added or removed.

A file is cut into records (a line, an element of a JSON list, a CSV record) without being read as a whole; each record
is a row, or a BadRow that says what is wrong with it. Lines are those of b"\\n", not of Unicode's other line ends.
"""

import csv
import io
import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sft.data.files import COMPRESSIONS, SEPARATOR_OF, kind
from sft.errors import BadRow, UserError

MAX_RECORD = 128 << 20  # bytes: a longer one is no row but a file that is broken
BLOCK = 1 << 20  # bytes read at a time
BOM = b"\xef\xbb\xbf"
OPEN, CLOSE = b"[{", {ord("}"): ord("{"), ord("]"): ord("[")}
STRUCTURE = re.compile(rb'["{}\[\],]')
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # of a JSON string, as much as is there
KNOWN_BEGINNINGS = (  # of files that their names don't tell
    ((b"\xff\xfe", b"\xfe\xff"), "is UTF-16: save it as UTF-8"),
    ((b"version https://git-lfs",), "is a pointer of Git LFS, not the file itself: run git lfs pull"),
    ((b"\x1f\x8b",), "is compressed: let its name end in .gz"),
    ((b"\x28\xb5\x2f\xfd",), "is compressed: let its name end in .zst"),
    ((b"PAR1",), "is Parquet: let its name end in .parquet"),
    ((b"PK\x03\x04",), "is a zip archive: unpack it"),
)


@dataclass(frozen=True)
class Layout:
    """How the records of a file lie in it."""

    form: str  # lines | list (one JSON list) | csv | tsv | text | document
    begin: int = 0  # byte of the first record, after BOM and header
    line: int = 1  # the line of that byte
    columns: tuple[str, ...] = ()  # of CSV and TSV


@dataclass(frozen=True)
class Record:
    begin: int  # byte, in the file
    end: int
    line: int  # of its first byte, counted from 1
    data: bytes | None  # None: longer than MAX_RECORD


class Number(float):
    """A JSON number whose text is not the one that Python would write, such as 1.50: str() is the file's text."""

    text: str

    def __str__(self) -> str:
        return self.text


def opened(file: Path) -> BinaryIO:
    """The file's bytes, decompressed on the way. OSError where a compressed file is cut off."""
    if file.suffix not in COMPRESSIONS:
        return file.open("rb")
    import pyarrow

    compressed = pyarrow.OSFile(str(file))
    return io.BufferedReader(pyarrow.CompressedInputStream(compressed, COMPRESSIONS[file.suffix]))


def layout(file: Path, sample_by: str) -> Layout:
    """Looks at a file's beginning. UserError, with what to do, for one that can't hold rows of its kind."""
    form = kind(file) or ""
    with opened(file) as stream:
        head = stream.read(BLOCK)
        if not head:
            raise UserError(f"{file}: the file is empty")
        for beginnings, what in KNOWN_BEGINNINGS:
            if head.startswith(beginnings):
                raise UserError(f"{file}: the file {what}")
        if b"\0" in head[:4096]:
            raise UserError(f"{file}: the file is no text (encrypted, binary, or in another encoding than UTF-8)")
        begin = len(BOM) if head.startswith(BOM) else 0
        if form == "text":
            return Layout("document" if sample_by == "document" else "text", begin)
        if form == "json":
            return Layout(_json_form(file, head[begin:]), begin)
    with opened(file) as stream:
        stream.read(begin)
        return _header(file, form, stream, begin)


def records(stream: BinaryIO, layout: Layout, file: Path, size: int | None = None) -> Iterator[Record]:
    """The records from the stream's position on, which is `layout.begin`; blank lines are none.

    With a `size` only those of as many bytes, which end after a record. UserError for a JSON list whose elements can't
    be told apart.
    """
    whole = size is None
    if size is not None:
        stream = io.BytesIO(stream.read(size))
    if layout.form == "document":
        data = stream.read(MAX_RECORD + 1)
        end = layout.begin + len(data) if len(data) <= MAX_RECORD else file.stat().st_size
        yield Record(layout.begin, end, layout.line, data if len(data) <= MAX_RECORD else None)
    elif layout.form == "list":
        yield from _elements(stream, layout, file, whole)
    elif layout.form in SEPARATOR_OF:
        yield from _csv_records(stream, layout)
    else:
        for record in _lines(stream, layout):
            if record.data is None or record.data.strip():
                yield record


def row_of(record: Record, layout: Layout) -> dict[str, object]:
    """The row that a record holds. BadRow without its place."""
    if record.data is None:
        raise BadRow("too_long", f"a row of more than {MAX_RECORD >> 20} MiB")
    if layout.form in ("lines", "list"):
        return _json_row(_text(record.data))
    if layout.form in SEPARATOR_OF:
        return _csv_row(record.data, layout)
    text = _text(record.data)
    return {"text": text if layout.form == "document" else text.removesuffix("\n").removesuffix("\r")}


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"byte 0x{data[error.start]:02x} is not UTF-8") from None


def _lines(stream: BinaryIO, layout: Layout) -> Iterator[Record]:
    begin, line = layout.begin, layout.line
    while data := stream.readline(MAX_RECORD + 1):
        size, too_long = len(data), len(data) > MAX_RECORD
        while too_long and not data.endswith(b"\n") and (data := stream.readline(BLOCK)):
            size += len(data)
        yield Record(begin, begin + size, line, None if too_long else data)
        begin, line = begin + size, line + 1


# JSON


def _json_form(file: Path, head: bytes) -> str:
    """Whether a file is one JSON list, or a row a line."""
    text = head.lstrip()
    first, newline, rest = text.partition(b"\n")
    if not text.startswith(b"["):
        if text.startswith(b"{") and newline and not _is_json(first) and not rest.lstrip().startswith(b"{"):
            raise UserError(
                f"{file}: one JSON object over several lines, but a row is a line or an element of a list: write each "
                "row on a line of its own (jq -c . does it, and jq -c '.data[]' where the rows are the list \"data\")"
            )
        return "lines"
    several = rest.lstrip().startswith((b"[", b"{")) and _is_json(first)  # lines, of which this one is a bad row
    return "lines" if several else "list"


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _json_row(text: str) -> dict[str, object]:
    try:
        row = json.loads(text, object_pairs_hook=_object, parse_float=_number)
    except (json.JSONDecodeError, RecursionError) as error:
        what = error.msg.removesuffix(" at") if isinstance(error, json.JSONDecodeError) else "nested too deeply"
        where = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRow("broken_json", f"broken JSON: {what}{where}") from None
    except BadRow:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise BadRow("broken_json", f"broken JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadRow("not_an_object", f"a row is a JSON object, not {_json_type(row)}")
    if "\\u" in text:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])[1:-1]
            raise BadRow("not_utf8", f"{half} is half a character: no text can hold it") from None
    return row


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys_and_values = dict(pairs)
    if len(keys_and_values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRow("key_twice", f"an object has the key {twice!r} twice")
    return keys_and_values


def _number(text: str) -> float:
    number = float(text)
    if repr(number) == text:
        return number
    written = Number(number)
    written.text = text
    return written


def _json_type(value: object) -> str:
    kinds: Mapping[type, str] = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return kinds.get(type(value), "null" if value is None else "a number")


def _elements(stream: BinaryIO, layout: Layout, file: Path, whole: bool) -> Iterator[Record]:
    """The elements of the one list that the file is. Found by brackets and quotes alone, so that an element which is
    broken within is a bad row."""
    is_open = bytearray() if whole else bytearray(b"[")  # the brackets that are
    parts: list[bytes] = []  # of the element
    begin, line, size, ended = layout.begin, layout.line, 0, False  # of the element: its first byte, its line, its size

    def element() -> Record:
        data = b"".join(parts)
        lead = len(data) - len(data.lstrip())
        return Record(
            begin + lead,
            begin + size,
            line + data.count(b"\n", 0, lead),
            data.strip() if size <= MAX_RECORD else None,
        )

    def fault(what: str) -> UserError:
        return UserError(
            f"{file}, the element that begins in line {element().line}: {what}: write the file again, best with a row "
            "on each line"
        )

    for block, marks in _structure(stream):
        taken = 0  # bytes of the block that belong to earlier elements
        for at, sign in marks:
            if ended:
                break
            depth = len(is_open)
            if sign in OPEN:
                is_open.append(sign)
            elif sign in CLOSE and is_open.pop() != CLOSE[sign]:
                raise fault(f"a bracket {chr(sign)} closes none of its kind")
            if (sign == ord(",") and depth == 1) or not is_open or depth == 0:
                parts.append(block[taken:at])
                size += at - taken
                ended = not is_open
                if depth and not (ended and not b"".join(parts).strip()):  # not what is before the list
                    yield element()
                line += sum(part.count(b"\n") for part in parts)
                begin, size, parts, taken = begin + size + 1, 0, [], at + 1
        rest = block[taken:]
        if ended and rest.strip():
            raise fault("text after the end of the list")
        size += len(rest)
        if size <= MAX_RECORD:
            parts.append(rest)
        else:
            line += rest.count(b"\n")
    if whole and not ended:
        raise fault("the list is not closed after it, so the file is cut off or a quote or bracket is missing")
    if not whole:
        yield element()


def _structure(stream: BinaryIO) -> Iterator[tuple[bytes, list[tuple[int, int]]]]:
    """Blocks of JSON, each with the brackets and commas in it that are in no string: (position, sign)."""
    in_string = escaped = False
    while block := stream.read(BLOCK):
        marks = []
        at = int(escaped)
        escaped = False
        while at < len(block):
            if in_string:
                at = INSIDE.match(block, at).end()  # type: ignore[union-attr]  # it matches nothing, too
                in_string = at == len(block) or block[at] != ord('"')
                escaped = at < len(block) and in_string  # a backslash ends the block: what it escapes is in the next
                at += 1
            elif found := STRUCTURE.search(block, at):
                at = found.end()
                sign = block[at - 1]
                if sign == ord('"'):
                    in_string = True
                else:
                    marks.append((at - 1, sign))
            else:
                break
        yield block, marks


# CSV


def _header(file: Path, form: str, stream: BinaryIO, begin: int) -> Layout:
    first = next(_csv_records(stream, Layout(form, begin)), None)
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


def _csv_records(stream: BinaryIO, layout: Layout) -> Iterator[Record]:
    """A record ends with its line, or where the quotes are closed. Of one that is broken only its first line is a
    record, so that what follows can be read."""
    csv.field_size_limit(sys.maxsize)
    lines = _lines(stream, layout)
    waiting: deque[Record] = deque()  # lines that were read ahead

    while first := waiting.popleft() if waiting else next(lines, None):
        if first.data is None or b'"' not in first.data:
            if first.data is None or first.data.strip(b"\r\n"):
                yield first
            continue
        taken: list[Record] = []

        def feed(first: Record = first, taken: list[Record] = taken) -> Iterator[str]:
            line: Record | None = first
            size = 0
            while line is not None and line.data is not None and size <= MAX_RECORD:
                taken.append(line)
                size += len(line.data)
                yield line.data.decode("latin-1")  # all that CSV means something by is ASCII
                line = waiting.popleft() if waiting else next(lines, None)
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
    text = _text(data)
    try:
        (fields,) = csv.reader(io.StringIO(text, newline=""), delimiter=SEPARATOR_OF[form], strict=True)
    except csv.Error as error:
        what = "a quote is opened and not closed" if "unexpected end" in str(error) else str(error).partition(" - ")[0]
        raise BadRow("broken_csv", f"broken {form.upper()}: {what}") from None
    return fields


def _csv_row(data: bytes, layout: Layout) -> dict[str, object]:
    fields = _fields(data, layout.form)
    if len(fields) != len(layout.columns):
        raise BadRow("number_of_fields", f"{len(fields)} fields, but the header has {len(layout.columns)}")
    return dict(zip(layout.columns, fields, strict=True))
