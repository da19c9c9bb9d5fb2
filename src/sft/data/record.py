"""A record: the bytes of one row in a text file, and where they are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from sft.errors import BadRow

MAX_RECORD = 128 << 20  # bytes: a longer one is no row but a file that is broken
BLOCK = 1 << 20  # bytes read at a time


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


def text_of(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRow("not_utf8", f"byte 0x{data[error.start]:02x} is not UTF-8") from None


def lines(stream: BinaryIO, layout: Layout) -> Iterator[Record]:
    begin, line = layout.begin, layout.line
    while data := stream.readline(MAX_RECORD + 1):
        size, too_long = len(data), len(data) > MAX_RECORD
        while too_long and not data.endswith(b"\n") and (data := stream.readline(BLOCK)):
            size += len(data)
        yield Record(begin, begin + size, line, None if too_long else data)
        begin, line = begin + size, line + 1
