"""Parquet and Arrow files → rows with the types they have.

Arrow gives each mapping of a column the keys of all, null where absent: a tool call would have the arguments of every
other. So nulls in mappings are removed here. To keep nulls that are meant, give the mapping as a JSON string.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sft.errors import BadRow, UserError

if TYPE_CHECKING:
    import pyarrow

Clean = Callable[[object], object]
# A text that isn't UTF-8, a time that Python has no type for, JSON that is none.
UNREADABLE = (ValueError, OverflowError, RecursionError)


def num_rows(file: Path) -> int:
    import pyarrow.parquet

    if file.suffix == ".parquet":
        with _readable(file):
            return int(pyarrow.parquet.read_metadata(file).num_rows)
    return sum(batch.num_rows for batch in _arrow_batches(file))


def batches(file: Path, max_rows: int, max_bytes: int) -> "Iterator[pyarrow.RecordBatch]":
    """The rows of a file, in batches of about as many rows and bytes at most, and no more of the file in memory."""
    source = _parquet_batches(file, max_rows, max_bytes) if file.suffix == ".parquet" else _arrow_batches(file)
    for batch in source:
        with _readable(file):
            _cleaners(batch.schema)  # reads the names
        yield from slices(batch, max_rows, max_bytes)


def slices(batch: "pyarrow.RecordBatch", max_rows: int, max_bytes: int) -> "Iterator[pyarrow.RecordBatch]":
    size = max(1, min(max_rows, batch.num_rows * max_bytes // max(batch.nbytes, 1)))
    for begin in range(0, batch.num_rows, size):
        yield batch.slice(begin, size)


def to_bytes(batch: "pyarrow.RecordBatch") -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return sink.getvalue().to_pybytes()


def from_bytes(data: bytes) -> "pyarrow.RecordBatch":
    import pyarrow

    with pyarrow.ipc.open_stream(data) as stream:
        return stream.read_next_batch()


def rows_of(batch: "pyarrow.RecordBatch") -> Iterator[dict[str, object] | BadRow]:
    clean = _cleaners(batch.schema)
    try:
        yield from [_row(row, clean) for row in batch.to_pylist()]
        return
    except UNREADABLE:
        pass
    for number in range(batch.num_rows):
        try:
            (row,) = batch.slice(number, 1).to_pylist()
            yield _row(row, clean)
        except UNREADABLE as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            yield BadRow("broken_value", f"a value can't be read: {why}")


def _cleaners(schema: "pyarrow.Schema") -> dict[str, Clean | None]:
    return {field.name: _cleaner(field.type) for field in schema}


def _row(row: dict[str, object], clean: dict[str, Clean | None]) -> dict[str, object]:
    return {
        name: value if value is None or (made := clean[name]) is None else made(value) for name, value in row.items()
    }


def _parquet_batches(file: Path, max_rows: int, max_bytes: int) -> "Iterator[pyarrow.RecordBatch]":
    import pyarrow.parquet

    with _readable(file), pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as parquet:
        metadata = parquet.metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            size = max(1, min(max_rows, group.num_rows * max_bytes // max(group.total_byte_size, 1)))
            yield from parquet.iter_batches(size, row_groups=[number], use_threads=False)


def _arrow_batches(file: Path) -> "Iterator[pyarrow.RecordBatch]":
    """Of a file in either of Arrow's formats; `datasets` writes that of streams."""
    import pyarrow

    with _readable(file), pyarrow.memory_map(str(file)) as mapped:
        try:
            reader = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid:
            mapped.seek(0)
            yield from pyarrow.ipc.open_stream(mapped)
            return
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


class _readable:
    """Makes Arrow's errors about a file ones of the user's."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | UnicodeDecodeError) or (
            isinstance(error, OSError) and error.errno is None
        ):
            what = " ".join(str(error).split())[:300] or type(error).__name__
            raise UserError(f"{self.file}: {what}: write the file again") from error


@cache
def _cleaner(kind: "pyarrow.DataType") -> Clean | None:
    """What makes a Python value of a type ours; None where it is so already."""
    import pyarrow.types as types

    if isinstance(kind, _json_type()):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if types.is_struct(kind):
        fields = {field.name: _cleaner(field.type) for field in kind}
        return lambda value: {
            key: item if (clean := fields[key]) is None else clean(item)
            for key, item in value.items()  # type: ignore[attr-defined]
            if item is not None
        }
    if types.is_map(kind):
        of_value = _cleaner(kind.item_type)
        return lambda value: {
            key: item if item is None or of_value is None else of_value(item)
            for key, item in value  # type: ignore[attr-defined]
        }
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _cleaner(kind.value_type)
        if of_item is None:
            return None
        return lambda value: [
            None if item is None else of_item(item)
            for item in value  # type: ignore[attr-defined]
        ]
    return None


def _json_type() -> type:
    import pyarrow

    return pyarrow.JsonType
