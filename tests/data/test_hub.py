"""A Hub data set is read by our own readers, from the Hub's cache, on a node without the network too."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
from datasets.packaged_modules.csv.csv import CsvConfig
from datasets.packaged_modules.json.json import JsonConfig

from sft.data import hub
from sft.data.fingerprint import data_fingerprint
from sft.data.rows import Source, all_rows
from sft.errors import UserError

COMMIT = "0123456789" * 4
ROWS = [{"q": "2024-05-01", "n": 1.5}, {"q": "a", "late": {"x": None}}]


@pytest.fixture(autouse=True)
def forgotten() -> None:
    hub._found.cache_clear()


class Hub:
    """Stands for `datasets`' builders and the Hub's cache, which is a folder."""

    def __init__(self, folder: Path, config: Any) -> None:
        self.folder, self.config, self.offline, self.asked = folder, config, False, []  # type: ignore[var-annotated]

    def builder(self, path: str, name: str | None) -> Any:
        self.asked.append((path, name))
        if self.offline:
            raise ConnectionError("offline")
        return SimpleNamespace(config=self.config, _relative_data_dir=lambda: f"a___b/default/0.0.0/{COMMIT}")

    def download(self, repo: str, name: str, *, repo_type: str, revision: str) -> str:
        assert (repo, repo_type, revision) == ("a/b", "dataset", COMMIT)
        return str(self.folder / name)


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, config: Any, **data_files: list[str]) -> Hub:
    config.data_files = {
        split: [f"hf://datasets/a/b@{COMMIT}/{name}" for name in names] for split, names in data_files.items()
    }
    made = Hub(folder, config)
    monkeypatch.setattr(datasets, "load_dataset_builder", made.builder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.download)
    return made


def write(file: Path, rows: list[Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_are_verbatim_and_the_node_without_network_finds_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = stand_in(
        tmp_path, monkeypatch, JsonConfig(), train=["data/train-0.jsonl", "data/train-1.jsonl"], test=["test.jsonl"]
    )
    for number, row in enumerate(ROWS):
        write(tmp_path / f"data/train-{number}.jsonl", [row])
    write(tmp_path / "test.jsonl", ROWS[:1])
    cache = tmp_path / "cache"
    assert list(all_rows(Source("a/b", name="main"), cache_dir=cache)) == ROWS
    assert list(all_rows(Source("a/b", "train[1:]", "main"), cache_dir=cache)) == ROWS[1:]
    assert list(all_rows(Source("a/b", "test", "main"), cache_dir=cache)) == ROWS[:1]
    with pytest.raises(UserError, match=r"^a/b: there is no split 'validation', only train, test$"):
        list(all_rows(Source("a/b", "validation", "main"), cache_dir=cache))
    assert made.asked == [("a/b", "main")]
    first = data_fingerprint(Source("a/b", "train", "main"), cache)

    hub._found.cache_clear()
    made.offline = True
    assert list(all_rows(Source("a/b", name="main"), cache_dir=cache)) == ROWS
    assert data_fingerprint(Source("a/b", "train", "main"), cache) == first


def test_the_fingerprint_is_the_one_that_datasets_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run begun before our readers read the data can be resumed."""
    write(tmp_path / "d.jsonl", ROWS[:1])
    options = {"data_files": {"train": str(tmp_path / "d.jsonl")}, "cache_dir": str(tmp_path / "hf")}
    builder = datasets.load_dataset_builder("json", **options)
    whole, part = (
        datasets.load_dataset("json", **options, split=split)._fingerprint for split in ("train", "train[:1]")
    )
    made = stand_in(tmp_path, monkeypatch, JsonConfig(), train=["d.jsonl"])
    monkeypatch.setattr(
        made,
        "builder",
        lambda *_: SimpleNamespace(config=made.config, _relative_data_dir=builder._relative_data_dir),
    )
    monkeypatch.setattr(datasets, "load_dataset_builder", made.builder)
    assert hub.fingerprint(Source("a/b"), tmp_path) == whole
    assert hub.fingerprint(Source("a/b", "train[:1]"), tmp_path) == part


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (CsvConfig(sep=";"), "d.csv"),
        (CsvConfig(header=None), "d.csv"),
        (JsonConfig(field="data"), "d.json"),
        (JsonConfig(), "d.zip"),
    ],
)
def test_what_the_data_sets_own_settings_change_is_left_to_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: Any, name: str
) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"q": "a", "call": {"x": 1}}, {"q": "b", "call": {"y": 2}}])

    stand_in(tmp_path, monkeypatch, config, train=[name])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(all_rows(Source("a/b", "train[:2]", "main"), cache_dir=tmp_path))
    assert rows == [{"q": "a", "call": {"x": 1}}, {"q": "b", "call": {"y": 2}}]
    assert set(map(str, asked)) == {str((("a/b", "main"), {"split": "train[:2]"}))}


def test_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach\n'a/b' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        UserError, match=r"^a/b \(not a local path, so a Hub data set\): Couldn't reach 'a/b' on the Hub$"
    ):
        list(all_rows(Source("a/b"), cache_dir=tmp_path))


def test_a_full_disk_is_not_blamed_on_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    stand_in(tmp_path, monkeypatch, JsonConfig(), train=["d.jsonl"])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(OSError, match="No space left on device"):
        list(all_rows(Source("a/b"), cache_dir=tmp_path))
