"""Files of every kind → rows, and files that are broken in every way → one line that says where."""

import errno
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from sft.data.rows import Source, load_rows
from sft.errors import UserError

ROWS = [{"q": "a", "n": 1}, {"q": "b", "n": 2}]


def jsonl(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def load(path: Path, cache: Path, split: str = "train") -> list[Any]:
    return load_rows(Source(str(path), split), cache).to_list()


def write(file: Path, content: str | bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.jsonl", jsonl(ROWS)),
        ("blank lines.jsonl", jsonl(ROWS).replace("\n", "\n\n")),
        ("d.json", jsonl(ROWS)),
        ("list.json", json.dumps(ROWS, indent=1)),
    ],
)
def test_a_file(tmp_path: Path, cache: Path, name: str, content: str) -> None:
    assert load(write(tmp_path / name, content), cache) == ROWS


def test_a_csv_file_is_text_as_it_stands_there(tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "d.csv", 'q,n\na,007\n"b\n""c""",NA\nd,\n')
    assert load(file, cache) == [{"q": "a", "n": "007"}, {"q": 'b\n"c"', "n": "NA"}, {"q": "d", "n": ""}]


def test_a_parquet_file(tmp_path: Path, cache: Path) -> None:
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "d.parquet")
    assert load(tmp_path / "d.parquet", cache) == ROWS


def test_a_slice_of_a_file(tmp_path: Path, cache: Path) -> None:
    assert load(write(tmp_path / "d.jsonl", jsonl(ROWS)), cache, "train[1:]") == ROWS[1:]


def test_a_folder_of_splits(tmp_path: Path, cache: Path) -> None:
    write(tmp_path / "f/train.jsonl", jsonl(ROWS))
    write(tmp_path / "f/test-00001-of-00002.jsonl", jsonl(ROWS[1:]))
    write(tmp_path / "f/test-00000-of-00002.jsonl", jsonl(ROWS[:1]))
    write(tmp_path / "f/LICENSE", "MIT")
    assert load(tmp_path / "f", cache) == ROWS
    assert load(tmp_path / "f", cache, "test") == ROWS
    assert load(tmp_path / "f", cache, "test[:1]") == ROWS[:1]
    with pytest.raises(UserError, match=r"no file for split 'val' .*, only test-00000-of-00002\.jsonl, test-"):
        load(tmp_path / "f", cache, "val")
    write(tmp_path / "f/train.csv", "q\na\n")
    with pytest.raises(UserError, match=r"'train' is in several formats \(train.csv, train.jsonl\)"):
        load(tmp_path / "f", cache)


def test_a_saved_data_set(tmp_path: Path, cache: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "s")
    assert load(tmp_path / "s", cache) == ROWS
    with pytest.raises(UserError, match=r"has no split 'test', only train$"):
        load(tmp_path / "s", cache, "test")


def test_saved_splits(tmp_path: Path, cache: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"fit": rows, "check": rows.select([0])}).save_to_disk(tmp_path / "s")
    assert load(tmp_path / "s", cache, "check") == ROWS[:1]
    with pytest.raises(UserError, match=r"has no split 'train', only fit, check$"):
        load(tmp_path / "s", cache)


def test_a_saved_data_set_that_is_broken(tmp_path: Path, cache: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "s")
    write(next((tmp_path / "s").glob("*.arrow")), "no Arrow")
    with pytest.raises(UserError, match=r"s \(train\): .*"):
        load(tmp_path / "s", cache)


def test_tool_arguments_of_other_rows_do_not_leak_in(tmp_path: Path, cache: Path) -> None:
    rows = [{"call": {"arguments": {"a": 1}}}, {"call": {"arguments": {"b": "x"}}}]
    assert load(write(tmp_path / "d.jsonl", jsonl(rows)), cache) == rows


NUM_BIG = 12  # MB; `datasets` reads 10 at a time and takes the columns' types from the first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "", "d.jsonl: the file is empty"),
        ("d.jsonl", " \n\n", "d.jsonl: "),
        ("d.csv", "q,n\n", 'd.csv: Instruction "train" corresponds to no data!'),
        ("d.jsonl", jsonl(ROWS) + '{"q": "c\n', "d.jsonl, line 3: broken JSON (Invalid control character at"),
        ("d.jsonl", jsonl(ROWS) + "{'q': 1}\n", "d.jsonl, line 3: broken JSON (Expecting property name"),
        ("d.jsonl", '{"q": 1}\n5\n', "d.jsonl, line 2: a row is a JSON object, not a number"),
        ("d.json", '[{"q": 1},\n {"q" 2}]', "d.json, line 2: broken JSON (Expecting ':' delimiter"),
        ("d.json", '[{"q": "a"}, 2]', "d.json, row 1: a row is a JSON object, not a number"),
        (
            "d.jsonl",
            b'{"q": "a"}\n{"q": "\xe9"}\n',
            "d.jsonl, line 2: not UTF-8 (byte 0xe9): save the file as UTF-8",
        ),
        ("d.csv", b"q,n\na,1\n\xe9,2\n", "d.csv, line 3: not UTF-8 (byte 0xe9)"),
        (
            "d.csv",
            "q,n\na,1\na,1,2\n",
            "d.csv: Error tokenizing data. C error: Expected 2 fields in line 3, saw 3",
        ),
        ("d.parquet", b"PAR1 and no more", "d.parquet: Parquet magic bytes not found"),
        (
            "d.jsonl",
            jsonl([{"q": 1, "rest": "x" * 1_000_000}] * NUM_BIG + [{"q": "a"}]),
            f"d.jsonl, line {NUM_BIG + 1}: column 'q' holds a string, but a number in line 1: give it",
        ),
        ("d.txt", "hello", "d.txt: not a known kind of file (.jsonl, .json, .csv, .parquet)"),
    ],
)
def test_a_broken_file_is_told_in_one_line(
    tmp_path: Path, cache: Path, name: str, content: str | bytes, message: str
) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        load(file, cache)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./data", "/no/such/folder", "~/no/such", "data.jsonl"])
def test_a_local_path_that_is_not_there_is_not_looked_up_on_the_hub(cache: Path, path: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        load_rows(Source(path), cache)


def test_hub_failures_are_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"^a/b \(not a local path, so a Hub data set\): Couldn't reach 'a/b' on the Hub$"
    ):
        load_rows(Source("a/b"), cache)


def test_hub_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(Source("a/b", "test", "main"), cache).to_list() == ROWS
    assert asked == [(("a/b", "main"), {"split": "test"})]


def test_a_source_without_rows(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"q": []}))
    with pytest.raises(UserError, match=r"a/b \(train\): it has no rows"):
        load_rows(Source("a/b"), cache)


def test_a_full_disk_is_not_blamed_on_the_file(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match="No space left on device"):
        load(write(tmp_path / "d.jsonl", jsonl(ROWS)), cache)


def test_a_source_is_named_as_a_user_knows_it() -> None:
    assert str(Source("some/where/rows.jsonl")) == "rows.jsonl"
    assert str(Source("openai/gsm8k", "test")) == "openai/gsm8k (test)"
