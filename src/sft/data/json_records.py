"""JSON, a row a line or in one list: where the records are, and what each holds."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from sft.data import record
from sft.data.record import Layout, Record
from sft.errors import BadRow, UserError

OPEN, CLOSE = b"[{", {ord("}"): ord("{"), ord("]"): ord("[")}
STRUCTURE = re.compile(rb'["{}\[\],]')
INSIDE = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # of a JSON string, as much as is there


class Number(float):
    """A JSON number whose text is not the one that Python would write, such as 1.50: str() is the file's text."""

    text: str

    def __str__(self) -> str:
        return self.text


def form(file: Path, head: bytes) -> str:
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


def row_of(text: str) -> dict[str, object]:
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


def elements(stream: BinaryIO, layout: Layout, file: Path, whole: bool) -> Iterator[Record]:
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
            data.strip() if size <= record.MAX_RECORD else None,
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
        if size <= record.MAX_RECORD:
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
    while block := stream.read(record.BLOCK):
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
