"""Files of every kind → rows, verbatim, and files that are broken in every way → one line that says where."""

import csv
import gzip
import io
import json
import random
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from sft.data import record, text_files
from sft.data import rows as rows_module
from sft.data.rows import Source, all_rows, first_rows, pieces
from sft.errors import BadRow, UserError

ROWS = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def gzipped(text: str) -> bytes:
    return gzip.compress(text.encode(), mtime=0)  # the names of tests hold it


def load(path: Path, split: str = "train", **options: Any) -> list[Any]:
    """The rows, with `reason: where and what` for a bad one; read in one process as in a worker."""
    source = Source(str(path), split, **options)
    rows = list(all_rows(source))
    again = [row for piece in pieces(source, None) for _, row in piece.without_rows().rows()]
    assert [row for row in again if not isinstance(row, BadRow)] == [row for row in rows if not isinstance(row, BadRow)]
    return [f"{row.reason}: {row}" if isinstance(row, BadRow) else row for row in rows]


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", jsonl(ROWS)),
        ("no last newline.jsonl", jsonl(ROWS).strip()),
        ("windows.jsonl", jsonl(ROWS).replace("\n", "\r\n")),
        ("blank lines.jsonl", jsonl(ROWS).replace("\n", "\n\n")),
        ("bom.jsonl", "\ufeff" + jsonl(ROWS)),
        ("d.json", jsonl(ROWS)),
        ("d.ndjson", jsonl(ROWS)),
        ("list.json", json.dumps(ROWS, indent=1)),
        ("list.jsonl", json.dumps(ROWS)),
        ("d.jsonl.gz", gzipped(jsonl(ROWS[:1])) + gzipped(jsonl(ROWS[1:]))),
        ("list.json.zst", pa.compress(json.dumps(ROWS).encode(), "zstd", asbytes=True)),
    ],
)
def test_a_file(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert load(write(tmp_path / name, content)) == ROWS


def test_json_is_as_it_stands_there(tmp_path: Path) -> None:
    """No type is guessed over a file, no null removed, no key added; a line end of Unicode's is text."""
    lines = [
        '{"a": 17.250000012345678, "b": 3e-11, "c": 2, "d": "2023-11-30", "e": "007", "f": 123456789012345678901}',
        '{"a": "text", "b": {"x": null}, "c": [{"y": 1}, {"z": null}], "d": null, "e": "a\u2028b\u0085c"}',
        '{"late": {"key": 1}}',
    ]
    assert load(write(tmp_path / "d.jsonl", "\n".join(lines))) == [
        {"a": 17.250000012345678, "b": 3e-11, "c": 2, "d": "2023-11-30", "e": "007", "f": 123456789012345678901},
        {"a": "text", "b": {"x": None}, "c": [{"y": 1}, {"z": None}], "d": None, "e": "a\u2028b\u0085c"},
        {"late": {"key": 1}},
    ]


def test_a_number_as_text_is_the_files(tmp_path: Path) -> None:
    [row] = load(write(tmp_path / "d.jsonl", '{"a": 1.50, "b": 1e3, "c": 2.0, "d": 1E-7}'))
    assert [str(value) for value in row.values()] == ["1.50", "1e3", "2.0", "1E-7"]
    assert list(row.values()) == [1.5, 1000.0, 2.0, 1e-7]
    assert json.dumps(row) == '{"a": 1.5, "b": 1000.0, "c": 2.0, "d": 1e-07}'


def test_a_csv_file_is_text_as_it_stands_there(tmp_path: Path) -> None:
    file = write(tmp_path / "d.csv", '\ufeffq,n\na,007\n"b\n""c""",NA\nd,\n\ntrue,1.50\r\n5" e, None\n"1\r\n2",null')
    assert load(file) == [
        {"q": "a", "n": "007"},
        {"q": 'b\n"c"', "n": "NA"},
        {"q": "d", "n": ""},
        {"q": "true", "n": "1.50"},
        {"q": '5" e', "n": " None"},
        {"q": "1\r\n2", "n": "null"},
    ]
    assert load(write(tmp_path / "d.tsv", "q\tn\na,b\t007\n")) == [{"q": "a,b", "n": "007"}]


def test_a_text_file_is_rows_of_lines_or_one_document(tmp_path: Path) -> None:
    file = write(tmp_path / "d.txt", "one\r\n\n two \nthree")
    assert load(file) == [{"text": "one"}, {"text": " two "}, {"text": "three"}]
    assert load(file, sample_by="document") == [{"text": "one\r\n\n two \nthree"}]


def test_bad_lines_end_nothing(tmp_path: Path) -> None:
    content = (
        b'{"q": 1}\n\n{"q": 2\n5\n{"q": "\xe9"}\n{"q": "\\ud83d"}\n{"q": "\\ud83d\\ude00"}\n{"q": 1, "q": 2}\n{"q": 3}'
    )
    assert load(write(tmp_path / "d.jsonl", content)) == [
        {"q": 1},
        "broken_json: d.jsonl line 3: broken JSON: Expecting ',' delimiter at character 9",
        "not_an_object: d.jsonl line 4: a row is a JSON object, not a number",
        "not_utf8: d.jsonl line 5: byte 0xe9 is not UTF-8",
        "not_utf8: d.jsonl line 6: \\ud83d is half a character: no text can hold it",
        {"q": "\U0001f600"},
        "key_twice: d.jsonl line 8: an object has the key 'q' twice",
        {"q": 3},
    ]
    assert load(write(tmp_path / "d.json", '[{"q": 1},\n {"q" 2}, 3,\n\n {"q": "]\\""}]')) == [
        {"q": 1},
        "broken_json: d.json line 2: broken JSON: Expecting ':' delimiter at character 6",
        "not_an_object: d.json line 2: a row is a JSON object, not a number",
        {"q": ']"'},
    ]
    content = b'q,n\na,1\n1,2,3\nx\n"open,1\n"a"b,1\n\xe9,2\n"two\nlines",3'
    assert load(write(tmp_path / "d.csv", content)) == [
        {"q": "a", "n": "1"},
        "number_of_fields: d.csv line 3: 3 fields, but the header has 2",
        "number_of_fields: d.csv line 4: 1 fields, but the header has 2",
        "broken_csv: d.csv line 5: broken CSV: a quote is opened and not closed",
        "broken_csv: d.csv line 6: broken CSV: ',' expected after '\"'",
        "not_utf8: d.csv line 7: byte 0xe9 is not UTF-8",
        {"q": "two\nlines", "n": "3"},
    ]


def test_a_row_that_is_too_long_is_a_bad_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_RECORD", 1 << 20)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 1 << 19)
    rows = [{"q": "a"}, {"q": "x" * (3 << 20)}, {"q": "y" * 1000}]
    for name, content in (
        ("d.jsonl", jsonl(rows)),
        ("d.json", json.dumps(rows)),
        ("d.csv", "q\na\n" + "x" * (3 << 20)),
    ):
        assert load(write(tmp_path / name, content))[:2] == [
            {"q": "a"},
            f"too_long: {name} line {2 + (name == 'd.csv') - (name == 'd.json')}: a row of more than 1 MiB",
        ]
    assert load(tmp_path / "d.json")[2] == {"q": "y" * 1000}


def test_any_rows_come_back_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = ["x\\", '"q"', "[{,}]\n", 1, None, [{"z": '\\"'}], "é\u2028", "\r\nn", ""]
    for seed in range(60):
        draw = random.Random(seed)
        monkeypatch.setattr(record, "BLOCK", draw.choice([1, 2, 3, 7, 64]))
        monkeypatch.setattr(rows_module, "CHUNK", draw.choice([1, 2, 5]))
        monkeypatch.setattr(rows_module, "CHUNK_BYTES", draw.choice([10, 50, 1000]))
        rows = [{draw.choice('ab"\\]'): draw.choice(values)} for _ in range(draw.randint(1, 12))]
        as_list = json.dumps(rows, indent=draw.choice([None, 1]), ensure_ascii=draw.choice([True, False]))
        assert load(write(tmp_path / "d.json", as_list)) == rows
        assert load(write(tmp_path / "d.jsonl", jsonl(rows))) == rows
        texts = [[str(draw.choice(values)), str(draw.choice(values))] for _ in rows]
        table = io.StringIO(newline="")
        csv.writer(table, lineterminator=draw.choice(["\n", "\r\n"])).writerows([["a", "b"], *texts])
        assert load(write(tmp_path / "d.csv", table.getvalue())) == [dict(zip("ab", row, strict=True)) for row in texts]


def test_a_slice_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK", 3)
    rows = [{"n": n} for n in range(10)]
    file = write(tmp_path / "d.jsonl", jsonl(rows))
    assert load(file, "train[1:]") == rows[1:]
    assert load(file, "train[:90%]") == rows[:9]
    assert load(file, "train[-2:]") == rows[8:]
    assert load(file, "train[2:5]+train[7:100]") == rows[2:5] + rows[7:]
    with pytest.raises(
        UserError, match=r"split 'train\[:x\]' can't be read .*: write train\[:1000\] or train\[10%:20%"
    ):
        load(file, "train[:x]")
    with pytest.raises(UserError) as error:
        load(file, "train[\n]")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="it has no rows"):
        load(file, "train[20:]")


def test_places_are_those_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "CHUNK", 3)
    file = write(tmp_path / "d.jsonl", "\n".join("{}" for _ in range(10)))
    arrow = tmp_path / "d.parquet"
    pa.parquet.write_table(pa.table({"n": list(range(10))}), arrow)
    for path, expected in (
        (file, ["d.jsonl line 6", "d.jsonl line 7"]),
        (arrow, ["row 5 of d.parquet", "row 6 of d.parquet"]),
    ):
        found = [place for piece in pieces(Source(str(path), "train[5:7]"), None) for place, _ in piece.rows()]
        assert found == expected


def test_the_first_rows_are_good_ones_and_the_rest_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "d.jsonl", "{\n" + jsonl([{"n": n} for n in range(1000)]))
    assert first_rows(Source(str(file)), 2) == [{"n": 0}, {"n": 1}]
    assert len(first_rows(Source(str(file)), 5000)) == 1000
    read: list[int] = []
    real = text_files.lines
    monkeypatch.setattr(text_files, "lines", lambda *args: (read.append(1) or line for line in real(*args)))
    first_rows(Source(str(file)), 2)
    assert len(read) < 300


def test_arrow_keeps_types_and_loses_only_the_nulls_it_adds(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    table = pa.table(
        {
            "call": calls,
            "calls": [calls, None],
            "none": pa.array([None, None], pa.string()),
            "when": [date(2023, 11, 30), date(2024, 2, 29)],
            "map": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int64())),
            "json": pa.array(['{"a": null}', None], pa.json_(pa.string())),
            "number": [1.5, 2.0],
        }
    )
    pa.parquet.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as writer:
        writer.write_table(table)
    first = {
        "call": calls[0],
        "calls": calls,
        "none": None,
        "when": date(2023, 11, 30),
        "map": {"k": 1},
        "json": {"a": None},
        "number": 1.5,
    }
    second = {"call": calls[1], "calls": None, "none": None, "when": date(2024, 2, 29), "map": {}, "json": None}
    for name in ("d.parquet", "d.arrow"):
        assert load(tmp_path / name) == [first, {**second, "number": 2.0}]


def test_a_huge_row_group_is_read_in_pieces(tmp_path: Path) -> None:
    table = pa.table({"n": list(range(3000)), "text": ["x" * 20_000] * 3000})
    pa.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=3000, use_dictionary=False, compression="none")
    found = list(pieces(Source(str(tmp_path / "d.parquet")), None))
    assert sum(piece.num_rows for piece in found) == 3000
    assert max(piece.num_bytes for piece in found) < 5 << 20
    assert [row["n"] for row in load(tmp_path / "d.parquet", "train[2000:2003]")] == [2000, 2001, 2002]


def test_a_folder_of_splits(tmp_path: Path) -> None:
    write(tmp_path / "f/train.jsonl", jsonl(ROWS))
    write(tmp_path / "f/test-00001-of-00002.jsonl", jsonl([{"other": 1}]))
    write(tmp_path / "f/test-00000-of-00002.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "f/LICENSE", "MIT")
    write(tmp_path / "f/README.txt", "read me")
    assert load(tmp_path / "f") == ROWS
    assert load(tmp_path / "f", "test") == [ROWS[0], {"other": 1}]
    assert load(tmp_path / "f", "test[:1]") == ROWS[:1]
    assert load(tmp_path / "f", "train+test") == [*ROWS, ROWS[0], {"other": 1}]
    with pytest.raises(
        UserError, match=r"no file for split 'val' .*, only README\.txt, test-00000-of-00002\.jsonl, test-"
    ):
        load(tmp_path / "f", "val")
    write(tmp_path / "f/train.csv", "q\na\n")
    with pytest.raises(UserError, match=r"'train' is in several formats \(train.csv, train.jsonl\)"):
        load(tmp_path / "f")


def test_a_clone_of_a_hub_repository(tmp_path: Path) -> None:
    rows = [{"q": "a"}, {"q": "b"}]
    for folder in ("data", "main", "other/data"):
        (tmp_path / "f" / folder).mkdir(parents=True)
        for number, row in enumerate(rows):
            pa.parquet.write_table(
                pa.Table.from_pylist([{**row, "in": folder}]),
                tmp_path / f"f/{folder}/train-0000{number}-of-00002.parquet",
            )
    write(tmp_path / "f/README.md", "# a data set")
    assert load(tmp_path / "f") == [{**row, "in": "data"} for row in rows]
    assert load(tmp_path / "f", name="main") == [{**row, "in": "main"} for row in rows]
    assert load(tmp_path / "f", name="none") == [{**row, "in": "data"} for row in rows]
    assert load(tmp_path / "f" / "other") == [{**row, "in": "other/data"} for row in rows]
    for file in (tmp_path / "f/data").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"no file for split 'train' .*: set data\.name to one of its folders main$"):
        load(tmp_path / "f")


def test_shards(tmp_path: Path) -> None:
    write(tmp_path / "f/part-1.jsonl.gz", gzipped(jsonl(ROWS[:1])))
    write(tmp_path / "f/part-2.jsonl", jsonl([{"late": "key"}]))
    write(tmp_path / "f/notes.txt", "not a row")
    assert load(tmp_path / "f") == [ROWS[0], {"late": "key"}]
    assert load(tmp_path / "f/part-*") == [ROWS[0], {"late": "key"}]
    with pytest.raises(UserError, match="no file for split 'test'"):
        load(tmp_path / "f", "test")
    write(tmp_path / "g/train/x.csv", "q\na\n")
    write(tmp_path / "g/test/y.csv", "q\nb\n")
    assert load(tmp_path / "g") == [{"q": "a"}]
    assert load(tmp_path / "g", "test") == [{"q": "b"}]
    write(tmp_path / "f/part-2.jsonl.gz", "")
    with pytest.raises(UserError, match=r"has a file twice \(part-1\.jsonl\.gz, part-2\.jsonl, part-2\.jsonl\.gz\)"):
        load(tmp_path / "f")


def test_a_saved_data_set(tmp_path: Path) -> None:
    rows = [{"q": "a", "call": {"x": 1}}, {"q": "b", "call": {"y": None}}]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "s", num_shards=2)
    assert load(tmp_path / "s") == [{"q": "a", "call": {"x": 1}}, {"q": "b", "call": {}}]
    assert load(tmp_path / "s", "train[1:]") == [{"q": "b", "call": {}}]
    with pytest.raises(UserError, match=r"has no split 'test', only train$"):
        load(tmp_path / "s", "test")


def test_saved_splits(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"fit": rows, "check": rows.select([0])}).save_to_disk(tmp_path / "s")
    assert load(tmp_path / "s", "check") == ROWS[:1]
    with pytest.raises(UserError, match=r"has no split 'train', only fit, check$"):
        load(tmp_path / "s")


def test_a_carriage_return_in_a_csv_record_is_a_bad_row_and_in_the_header_a_line(tmp_path: Path) -> None:
    rows = load(write(tmp_path / "d.csv", 'q,n\na\rb,1\n"a\rb",2\n'))
    assert rows[1] == {"q": "a\rb", "n": "2"}
    assert "broken_csv: d.csv line 2: broken CSV: a carriage return in no quotes" in rows[0]
    with pytest.raises(UserError, match=r"mac\.csv, line 1: the header can't be read: .*a carriage return"):
        load(write(tmp_path / "mac.csv", "q,n\ra,1\rb,2\r"))


def test_a_value_that_arrow_can_t_give_is_a_bad_row(tmp_path: Path) -> None:
    broken = pa.Array.from_buffers(pa.string(), 2, [None, *pa.array([b"a", b"\xff"]).buffers()[1:]])
    days = pa.array([0, 2**62], pa.int64()).view(pa.timestamp("us"))
    given = pa.array(['{"a": 1}', "{"]).cast(pa.json_())
    for number, column in enumerate((broken, days, given)):
        file = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pa.table({"c": column, "n": [1, 2]}), file)
        good, bad = load(file)
        assert good["n"] == 1 and bad.startswith(f"broken_value: row 1 of {number}.parquet: ")


def test_a_name_of_a_column_that_is_not_utf8_is_said(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pa.table({"c": [{"role": "x"}]}), tmp_path / "d.parquet", store_schema=False)
    data = (tmp_path / "d.parquet").read_bytes()
    with pytest.raises(UserError, match=r"d\.parquet: .*: write the file again$"):
        load(write(tmp_path / "d.parquet", data.replace(b"role", b"\xffole")))


def test_a_saved_data_set_that_is_broken(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "s")
    write(next((tmp_path / "s").glob("*.arrow")), "no Arrow")
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow: .*: write the file again$"):
        load(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl: the file is empty"),
        ("d.jsonl", " \n\n", "d.jsonl: it has no rows"),
        ("d.json", "[]", "d.json: it has no rows"),
        ("d.csv", "q,n\n", "d.csv: it has no rows"),
        ("d.json", '[{"q": 1},\n {"q" 2}', "d.json, the element that begins in line 2: the list is not closed"),
        ("d.json", '[{"q": 1}]\n]', "d.json, the element that begins in line 1: text after the end of the list"),
        (
            "d.json",
            '[{"q": [1}, {"q": 2}]',
            "d.json, the element that begins in line 1: a bracket } closes none of its",
        ),
        ("d.json", '{\n "data": [{"q": 1}]\n}', "d.json: one JSON object over several lines, but a row is a line"),
        ("d.jsonl", jsonl(ROWS).encode("utf-16"), "d.jsonl: the file is UTF-16: save it as UTF-8"),
        ("d.csv", b"\x00\x01\x02", "d.csv: the file is no text (encrypted, binary, or in another encoding than UTF-8)"),
        ("d.jsonl", "version https://git-lfs.github.com/spec/v1\n", "d.jsonl: the file is a pointer of Git LFS"),
        ("d.jsonl", gzipped("{}"), "d.jsonl: the file is compressed: let its name end in .gz"),
        ("d.jsonl.gz", gzipped('{"q": 1}\n')[:-4], "d.jsonl.gz: the compressed file is broken ("),
        (
            "d.jsonl.zst",
            pa.compress(b'{"q": 1}\n' * 99, "zstd", asbytes=True)[:-4],
            "zst: the compressed file is broken",
        ),
        ("d.csv", "q;n\na;1\n", "d.csv: the file is separated by semicolons: save it with commas"),
        ("d.csv", "q\tn\na\t1\n", "d.csv: the file is separated by tabs: let its name end in .tsv"),
        ("d.csv", "q,q\na,1\n", "d.csv, line 1: two columns are called 'q': correct the header"),
        ("d.csv", "q,\na,1\n", "d.csv, line 1: a column has no name: correct the header"),
        ("d.csv", b"q,\xe9\na,1\n", "d.csv, line 1: the header can't be read: byte 0xe9 is not UTF-8"),
        ("d.parquet", b"PAR1 and no more", "d.parquet: Parquet magic bytes not found"),
        ("d.parquet", b"", "d.parquet: the file is empty"),
        ("d.xlsx", "hello", "d.xlsx: not a known kind of file (.jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"),
    ],
)
def test_a_broken_file_is_told_in_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./data", "/no/such/folder", "~/no/such", "data.jsonl", "shards/*.jsonl"])
def test_a_local_path_that_is_not_there_is_not_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        list(all_rows(Source(path)))


def test_a_source_is_named_as_a_user_knows_it() -> None:
    assert str(Source("some/where/rows.jsonl")) == "rows.jsonl"
    assert str(Source("some/where/rows.csv.gz")) == "rows.csv.gz"
    assert str(replace(Source("openai/gsm8k"), split="test")) == "openai/gsm8k (test)"
