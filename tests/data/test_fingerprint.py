"""What makes a new store, and what doesn't."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from sft.data import fingerprint
from sft.data.conversation import prompt_response, text
from sft.data.fingerprint import data_fingerprint, mask_fingerprint
from sft.data.mask import Tokenization
from sft.data.rows import Source
from sft.errors import UserError

from .conftest import CHAT, word_tokenizer


def settled(file: Path, content: str) -> Path:
    """A file that was not written just now."""
    file.write_text(content)
    os.utime(file, (time.time() - 100, time.time() - 100))
    return file


def test_data_is_known_by_name_content_and_split(tmp_path: Path) -> None:
    def of(path: Path, split: str = "train") -> str:
        return data_fingerprint(Source(str(path), split), tmp_path / "cache")

    (tmp_path / "elsewhere").mkdir()
    first = of(settled(tmp_path / "d.jsonl", "one"))
    assert first == of(settled(tmp_path / "elsewhere/d.jsonl", "one"))
    assert first != of(settled(tmp_path / "d.csv", "one"))
    assert first != of(tmp_path / "d.jsonl", "train[:5]")
    settled(tmp_path / "d.jsonl", "two two")
    assert first != of(tmp_path / "d.jsonl")


def test_a_folder_is_known_by_the_files_of_the_split(tmp_path: Path) -> None:
    settled(tmp_path / "train.jsonl", "one")
    settled(tmp_path / "test.jsonl", "two")
    first = data_fingerprint(Source(str(tmp_path)), tmp_path / "cache")
    settled(tmp_path / "test.jsonl", "three")
    assert first == data_fingerprint(Source(str(tmp_path)), tmp_path / "cache")
    settled(tmp_path / "train-extra.jsonl", "four")
    assert first != data_fingerprint(Source(str(tmp_path)), tmp_path / "cache")


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(str(settled(tmp_path / "d.jsonl", "one")))
    monkeypatch.setattr(fingerprint, "RACY_SECONDS", 0)  # its last change was just now
    first = data_fingerprint(source, tmp_path / "cache")
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", None)  # would raise
    assert data_fingerprint(source, tmp_path / "cache") == first


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path) -> None:
    """It could change again without its size or modification time telling."""
    file = tmp_path / "d.jsonl"
    file.write_text("one")
    source, stat = Source(str(file)), file.stat()
    first = data_fingerprint(source, tmp_path / "cache")
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data_fingerprint(source, tmp_path / "cache") != first


def test_other_content_of_the_same_size_and_time_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Remembered as it is, written anew in place, and its modification time set back."""
    monkeypatch.setattr(fingerprint, "RACY_SECONDS", 0)
    file = settled(tmp_path / "d.jsonl", "one")
    source, stat = Source(str(file)), file.stat()
    first = data_fingerprint(source, tmp_path / "cache")
    while file.stat().st_ctime_ns == stat.st_ctime_ns:  # within the same tick of the file system's clock
        file.write_text("two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ino) == (3, stat.st_mtime_ns, stat.st_ino)
    assert data_fingerprint(source, tmp_path / "cache") != first


def test_a_cache_that_cannot_be_written_remembers_nothing(tmp_path: Path) -> None:
    source = Source(str(settled(tmp_path / "d.jsonl", "one")))
    in_the_way = settled(tmp_path / "cache", "a file")
    assert data_fingerprint(source, in_the_way / "x") == data_fingerprint(source, tmp_path / "other")


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", fail)
    with pytest.raises(UserError, match=r"d\.jsonl: cannot be read \(Permission denied\)"):
        data_fingerprint(Source(str(settled(tmp_path / "d.jsonl", "one"))), tmp_path / "cache")


def test_local_data_is_known_without_importing_datasets(tmp_path: Path) -> None:
    """It takes a second to import, which the opening of a store need not pay."""
    file = settled(tmp_path / "d.jsonl", "one")
    program = (
        "import sys; from pathlib import Path; from sft.data.fingerprint import data_fingerprint; "
        "from sft.data.rows import Source; import sft.data.dataset; "
        f"data_fingerprint(Source({str(file)!r}), Path({str(tmp_path)!r})); "
        "assert not {'datasets', 'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", program],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_whatever_decides_the_mask_is_seen() -> None:
    function = partial(prompt_response, prompt="q", chat=True)
    makers = [
        lambda: mask_fingerprint(Tokenization(word_tokenizer(), max_length=9), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(), max_length=8), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(), max_length=9, supervise="all"), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(), max_length=9, overlong="error"), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(CHAT + "\n"), max_length=9), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(before="<s>"), max_length=9), function),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(eos_token="<|end|>"), max_length=9), function),
        lambda: mask_fingerprint(
            Tokenization(word_tokenizer(), max_length=9), partial(prompt_response, prompt="r", chat=True)
        ),
        lambda: mask_fingerprint(Tokenization(word_tokenizer(), max_length=9), text),
    ]
    first = [make() for make in makers]
    assert len(set(first)) == len(makers)
    assert first == [make() for make in makers]


def test_what_a_call_leaves_in_the_tokenizer_is_not_seen() -> None:
    tokenizer = word_tokenizer(pad_token="<unk>")
    first = mask_fingerprint(Tokenization(tokenizer, max_length=9), text)
    tokenizer(["hi", "hi hi"], padding=True, truncation=True, max_length=2)
    assert mask_fingerprint(Tokenization(tokenizer, max_length=9), text) == first


def test_an_edit_of_the_users_row_function_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_rows.py").write_text("def row(row):\n    return None\n")
    module = importlib.import_module("my_rows")
    tokenization = Tokenization(word_tokenizer(), max_length=9)
    first = mask_fingerprint(tokenization, module.row)
    (tmp_path / "my_rows.py").write_text("def row(row):\n    return 1\n")
    assert mask_fingerprint(tokenization, module.row) != first
