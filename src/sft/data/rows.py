"""A source → rows, verbatim, in pieces that a process can read by itself."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

from sft.data import arrow_files, hub, record
from sft.data.files import COMPRESSIONS, SAVED, base_splits, kind, split_files
from sft.data.files import Source as Source
from sft.data.files import local_files as local_files
from sft.data.record import Layout, Record
from sft.data.text_files import layout, opened, records, row_of
from sft.errors import BadRow, UserError

Row = dict[str, object]

CHUNK = 250  # rows to a piece
CHUNK_BYTES = 4 << 20  # to a piece of more than one row
NO_END = 1 << 62  # of a slice
NEEDS_COUNT = re.compile(r"%|\[\s*-|:\s*-")  # a slice in percent, or from the end


@dataclass(frozen=True)
class Piece:
    """Some rows that follow each other in a file: where in it they are, or the rows themselves."""

    file: Path
    name: str  # of the file, as a user knows it
    first: int  # row of the file, counted from 0
    num_rows: int
    end: int  # byte after the last; of Arrow a row
    share: float = 1.0  # of its file that is read with this piece, from 0 to 1
    skip: int = 0  # rows at the beginning that are not wanted, beside `num_rows` that are
    layout: Layout | None = None  # of the first byte; None: Arrow
    held: tuple[Record, ...] | bytes | None = None  # the records, or Arrow's bytes

    @property
    def num_bytes(self) -> int:
        return self.end - self.layout.begin if self.layout else len(self.held or b"")

    def rows(self) -> Iterator[tuple[str, Row | BadRow]]:
        """Each row with its place, as a user would look it up."""
        every = self._text() if self.layout else self._arrow()
        return islice(every, self.skip, self.skip + self.num_rows)

    def without_rows(self) -> "Piece":
        """The same for another process: as small as can be."""
        return self if self.layout is None or self.file.suffix in COMPRESSIONS else replace(self, held=None)

    def _arrow(self) -> Iterator[tuple[str, Row | BadRow]]:
        assert isinstance(self.held, bytes)
        for number, row in enumerate(arrow_files.rows_of(arrow_files.from_bytes(self.held)), self.first):
            yield f"row {number} of {self.name}", row

    def _text(self) -> Iterator[tuple[str, Row | BadRow]]:
        assert self.layout is not None
        held = self.held
        for found in held if isinstance(held, tuple) else self._read(self.layout):
            try:
                row: Row | BadRow = row_of(found, self.layout)
            except BadRow as error:
                row = error
            yield f"{self.name} line {found.line}", row

    def _read(self, layout: Layout) -> Iterator[Record]:
        size = self.end - layout.begin
        if size > record.MAX_RECORD:  # a piece of one row
            yield Record(layout.begin, self.end, layout.line, None)
            return
        with self.file.open("rb") as file:
            file.seek(layout.begin)
            yield from records(file, layout, self.file, size)


def first_rows(source: Source, n: int, *, cache_dir: Path | None = None) -> list[Row]:
    """The first n good rows, or all if there are fewer; reads only the beginning, and writes no cache."""
    good = (row for row in all_rows(source, cache_dir=cache_dir) if not isinstance(row, BadRow))
    return list(islice(good, n))


def all_rows(source: Source, *, cache_dir: Path | None = None) -> Iterator[Row | BadRow]:
    """Each row in order; in the place of a bad one a BadRow that says where it is."""
    for piece in pieces(source, cache_dir):
        for place, row in piece.rows():
            yield BadRow(row.reason, f"{place}: {row}") if isinstance(row, BadRow) else row


def pieces(source: Source, cache_dir: Path | None) -> Iterator[Piece]:
    """All rows of a source. UserError in one line for what can't be read as a whole, with the file and its line if they
    are known, and for a source without rows."""
    num_rows = 0
    for split, begin, end in ranges(source, cache_dir):
        files = _files(source, split, cache_dir)
        every = _of_dataset(source) if files is None else _of_files(files, source.sample_by)
        for piece in _cut(every, begin, end):
            num_rows += piece.num_rows
            yield piece
        if files is None:
            break  # it has all splits and slices
    if num_rows == 0:
        raise UserError(f"{source}: it has no rows")


def ranges(source: Source, cache_dir: Path | None) -> list[tuple[str, int, int]]:
    """The rows of each split that a source means: (split, first row, row after the last), NO_END for all."""
    if "[" not in source.split or _files(source, base_splits(source.split)[0], cache_dir) is None:
        return [(split.strip(), 0, NO_END) for split in source.split.split("+")]
    from datasets import ReadInstruction

    count: Callable[[str], int] = (
        (lambda split: _count(source, split, cache_dir)) if NEEDS_COUNT.search(source.split) else lambda split: NO_END
    )
    lengths = {split: count(split) for split in base_splits(source.split)}
    try:
        slices = ReadInstruction.from_spec(source.split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"split {source.split!r} can't be read ({why}): write train[:1000] or train[10%:20%]") from None
    return [(each.splitname, each.from_, each.to) for each in slices]


def _files(source: Source, split: str, cache_dir: Path | None) -> list[Path] | None:
    """The files of a split, local or of the Hub; None if only `datasets` can read them."""
    files = split_files(source, split)
    if files is None:
        return hub.split_files(source, split, cache_dir)
    state = next((file for file in files if file.name == SAVED), None)
    if state is None:
        return files
    return [state.parent / file["filename"] for file in json.loads(state.read_text())["_data_files"]]


def _count(source: Source, split: str, cache_dir: Path | None) -> int:
    return sum(
        _count_file(file, file.stat().st_size, file.stat().st_mtime_ns, source.sample_by)
        for file in _files(source, split, cache_dir) or []
    )


@lru_cache
def _count_file(file: Path, size: int, modified: int, sample_by: str) -> int:
    if kind(file) in ("parquet", "arrow"):
        return arrow_files.num_rows(file)
    return sum(piece.num_rows for piece in _of_text(file, sample_by))


def _cut(pieces: Iterator[Piece], begin: int, end: int) -> Iterator[Piece]:
    position = 0
    for piece in pieces:
        if position >= end:
            return
        skip = max(begin - position, 0)
        num_rows = min(piece.num_rows, end - position) - skip
        position += piece.num_rows
        if num_rows > 0:
            yield replace(piece, skip=skip, num_rows=num_rows)


def _of_files(files: list[Path], sample_by: str) -> Iterator[Piece]:
    sizes = [file.stat().st_size for file in files]
    before = 0
    for file, size in zip(files, sizes, strict=True):
        if size == 0:
            raise UserError(f"{file}: the file is empty")
        for piece in _of_arrow(file) if kind(file) in ("parquet", "arrow") else _of_text(file, sample_by):
            yield replace(piece, share=(before + piece.share * size) / sum(sizes))
        before += size


def _of_text(file: Path, sample_by: str) -> Iterator[Piece]:
    with _readable(file):
        form = layout(file, sample_by)
        size = file.stat().st_size
        with opened(file) as stream:
            stream.read(form.begin)
            held: list[Record] = []
            first = 0

            def piece() -> Piece:
                begin = replace(form, begin=held[0].begin, line=held[0].line)
                share = min(held[-1].end / size, 1.0)
                return Piece(file, file.name, first, len(held), held[-1].end, share, 0, begin, tuple(held))

            for found in records(stream, form, file):
                if held and (len(held) == CHUNK or found.end - held[0].begin > CHUNK_BYTES):
                    yield piece()
                    first += len(held)
                    held = []
                held.append(found)
            if held:
                yield piece()


def _of_arrow(file: Path) -> Iterator[Piece]:
    first, num_rows = 0, arrow_files.num_rows(file)
    for batch in arrow_files.batches(file, CHUNK, CHUNK_BYTES):
        end = first + batch.num_rows
        yield Piece(file, file.name, first, batch.num_rows, end, end / num_rows, held=arrow_files.to_bytes(batch))
        first = end


def _of_dataset(source: Source) -> Iterator[Piece]:
    rows = hub.dataset(source)
    first = 0
    for whole in rows.with_format("arrow").iter(CHUNK):
        for batch in whole.combine_chunks().to_batches():
            for part in arrow_files.slices(batch, CHUNK, CHUNK_BYTES):
                end = first + part.num_rows
                held = arrow_files.to_bytes(part)
                yield Piece(Path(source.path), source.path, first, part.num_rows, end, end / len(rows), held=held)
                first = end


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Makes errors of reading ones of the user's."""
    try:
        yield
    except OSError as error:
        if file.suffix not in COMPRESSIONS or error.errno is not None:
            raise
        raise UserError(f"{file}: the compressed file is broken ({error}): write it again") from error
