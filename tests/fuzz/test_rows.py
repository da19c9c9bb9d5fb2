"""Bytes → rows, bad rows, or one line for the user; nothing else, and nothing is changed."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.rows import Source, all_rows, pieces
from sft.errors import BadRow, UserError

from .drawn import fuzz, mutated, objects, said, texts

TABLE = pa.table(
    {
        "prompt": ["a", "b", None],
        "messages": [[{"role": "user", "content": "x", "n": 1.5}], [], None],
        "m": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        "id": [1, 2, 3],
        "j": pa.array(['{"a": 1}', "[]", None]).cast(pa.json_()),
    }
)


def parquet_bytes() -> bytes:
    sink = io.BytesIO()
    parquet.write_table(TABLE, sink)
    return sink.getvalue()


def arrow_bytes(new: Any) -> bytes:
    sink = io.BytesIO()
    with new(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue()


lines = st.lists(objects, max_size=4).map(lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode())
lists = st.lists(objects, max_size=4).map(lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode())


def written(rows: list[list[str]], dialect: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, dialect).writerows(rows)
    return text.getvalue().encode()


fields = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=8)
tables = st.integers(1, 3).flatmap(
    lambda width: st.lists(st.lists(fields, min_size=width, max_size=width), min_size=1, max_size=4)
)
ORIGINALS: dict[str, st.SearchStrategy[bytes]] = {
    "d.jsonl": lines | lists,
    "d.json": lists | lines,
    "d.csv": tables.map(lambda rows: written(rows, "excel")),
    "d.tsv": tables.map(lambda rows: written(rows, "excel-tab")),
    "d.txt": texts.map(str.encode),
    "d.jsonl.gz": lines.map(lambda data: gzip.compress(data, mtime=0)),
    "d.csv.zst": tables.map(lambda rows: pa.compress(written(rows, "excel"), "zstd", asbytes=True)),
    "d.parquet": st.just(parquet_bytes()),
    "d.arrow": st.sampled_from([arrow_bytes(pa.ipc.new_stream), arrow_bytes(pa.ipc.new_file)]),
}


def read(file: Path, split: str = "train", **options: Any) -> list[Any]:
    """All rows, read whole as well as piece by piece; UserError in one line."""
    source = Source(str(file), split, **options)
    rows = list(all_rows(source))
    again = [row for piece in pieces(source, None) for _, row in piece.without_rows().rows()]
    assert [type(row) for row in again] == [type(row) for row in rows]
    assert repr([row for row in again if not isinstance(row, BadRow)]) == repr(
        [row for row in rows if not isinstance(row, BadRow)]
    )
    for row in rows:
        if isinstance(row, BadRow):
            assert "\n" not in str(row) and row.reason
        else:
            assert isinstance(row, dict) and all(isinstance(key, str) for key in row)
            json.dumps(row, ensure_ascii=False, default=str).encode()  # no text that none can hold
    return rows


@pytest.mark.parametrize("name", ORIGINALS)
def test_any_bytes_are_rows_or_said_in_a_line(name: str, tmp_path: Path) -> None:
    file = tmp_path / name

    @given(st.binary(max_size=60) | mutated(ORIGINALS[name]), st.sampled_from(("line", "document")))
    def any_bytes(data: bytes, sample_by: str) -> None:
        file.write_bytes(data)
        try:
            read(file, sample_by=sample_by)
        except UserError as error:
            said(error, file.name)

    fuzz(any_bytes)


@pytest.mark.parametrize("form", ["lines", "list"])
def test_what_json_writes_comes_back_equal(form: str, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"

    @given(st.lists(objects, min_size=1, max_size=5), st.booleans(), st.sampled_from((None, 1)))
    def json_rows(rows: list[dict[str, object]], ascii: bool, indent: int | None) -> None:
        if form == "list":
            file.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii))
        else:
            file.write_text("".join(json.dumps(row, ensure_ascii=ascii) + "\n" for row in rows))
        assert read(file) == rows

    fuzz(json_rows)


@pytest.mark.parametrize(("name", "dialect"), [("d.csv", "excel"), ("d.tsv", "excel-tab")])
def test_what_csv_writes_comes_back_equal(name: str, dialect: str, tmp_path: Path) -> None:
    file = tmp_path / name

    @given(tables)
    def csv_rows(rows: list[list[str]]) -> None:
        file.write_bytes(written([[f"c{number}" for number in range(len(rows[0]))], *rows], dialect))
        blank = [row for row in rows if row in ([""], [])]
        assert [list(row.values()) for row in read(file)] == rows or blank

    fuzz(csv_rows)


def test_any_slice_is_rows_or_said_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"n": n}) + "\n" for n in range(7)))
    ends = st.integers(-9, 9).map(str) | st.integers(-110, 110).map("{}%".format) | st.just("")
    parts = st.builds("train[{}:{}]".format, ends, ends) | st.sampled_from(("train", "train[", "[:]", "", "train[::2]"))
    splits = st.lists(parts, min_size=1, max_size=3).map("+".join) | texts.map("train[{}]".format) | texts

    @given(splits)
    def any_split(split: str) -> None:
        try:
            rows = read(file, split)
        except UserError as error:
            said(error)
        else:
            assert {row["n"] for row in rows} <= {*range(7)}

    fuzz(any_split)
