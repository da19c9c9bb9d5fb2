"""Files of JSON, CSV, TSV and plain text → rows, verbatim: nothing is guessed, converted, added or removed.

A file is cut into records (a line, an element of a JSON list, a CSV record) without being read as a whole; each record
is a row, or a BadRow that says what is wrong with it. Lines are those of b"\\n", not of Unicode's other line ends.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sft.data import csv_records, json_records, record
from sft.data.files import COMPRESSIONS, SEPARATOR_OF, kind
from sft.data.record import Layout, Record, lines, text_of
from sft.errors import BadRow, UserError

BOM = b"\xef\xbb\xbf"
KNOWN_BEGINNINGS = (  # of files that their names don't tell
    ((b"\xff\xfe", b"\xfe\xff"), "is UTF-16: save it as UTF-8"),
    ((b"version https://git-lfs",), "is a pointer of Git LFS, not the file itself: run git lfs pull"),
    ((b"\x1f\x8b",), "is compressed: let its name end in .gz"),
    ((b"\x28\xb5\x2f\xfd",), "is compressed: let its name end in .zst"),
    ((b"PAR1",), "is Parquet: let its name end in .parquet"),
    ((b"PK\x03\x04",), "is a zip archive: unpack it"),
)


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
        head = stream.read(record.BLOCK)
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
            return Layout(json_records.form(file, head[begin:]), begin)
    with opened(file) as stream:
        stream.read(begin)
        return csv_records.header(file, form, stream, begin)


def records(stream: BinaryIO, layout: Layout, file: Path, size: int | None = None) -> Iterator[Record]:
    """The records from the stream's position on, which is `layout.begin`; blank lines are none.

    With a `size` only those of as many bytes, which end after a record. UserError for a JSON list whose elements can't
    be told apart.
    """
    whole = size is None
    if size is not None:
        stream = io.BytesIO(stream.read(size))
    if layout.form == "document":
        data = stream.read(record.MAX_RECORD + 1)
        end = layout.begin + len(data) if len(data) <= record.MAX_RECORD else file.stat().st_size
        yield Record(layout.begin, end, layout.line, data if len(data) <= record.MAX_RECORD else None)
    elif layout.form == "list":
        yield from json_records.elements(stream, layout, file, whole)
    elif layout.form in SEPARATOR_OF:
        yield from csv_records.split(stream, layout)
    else:
        for line in lines(stream, layout):
            if line.data is None or line.data.strip():
                yield line


def row_of(found: Record, layout: Layout) -> dict[str, object]:
    """The row that a record holds. BadRow without its place."""
    if found.data is None:
        raise BadRow("too_long", f"a row of more than {record.MAX_RECORD >> 20} MiB")
    if layout.form in ("lines", "list"):
        return json_records.row_of(text_of(found.data))
    if layout.form in SEPARATOR_OF:
        return csv_records.row_of(found.data, layout)
    text = text_of(found.data)
    return {"text": text if layout.form == "document" else text.removesuffix("\n").removesuffix("\r")}
