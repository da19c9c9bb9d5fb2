"""Validation is never on rows of training, or it is said."""

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.data.conversation import prompt_response
from sft.data.dataset import Datasets
from sft.data.splits import num_in_both
from sft.errors import UserError

from .conftest import data_config, word_tokenizer


def rows_file(path: Path, words: list[str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": "hi " * n, "response": "yes"}) + "\n" for n in map(int, words)))
    os.utime(path, (time.time() - 100, time.time() - 100))
    return path


def made(tmp_path: Path, lines: list[str] | None = None, **changes: Any) -> Datasets:
    settings = {
        "conversation": partial(prompt_response, chat=False),
        "num_workers": 1,
        "cache_dir": str(tmp_path / "c"),
    }
    config = data_config(**settings | changes)
    return config.datasets(word_tokenizer(), seed=0, log=(lines if lines is not None else []).append)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(rows_file(tmp_path / "a.jsonl", [str(n) for n in range(1, 11)]))


@pytest.mark.parametrize("split", ["test", "validation", "test[:5]"])
def test_a_single_file_has_no_other_split(tmp_path: Path, file: str, split: str) -> None:
    for path in (file, [file]):
        with pytest.raises(
            UserError, match=r"is a single file, which has no split of that name, .*: set data\.val_path"
        ):
            made(tmp_path, path=path, val_split=split)


def test_the_training_file_is_no_validation_file(tmp_path: Path, file: str) -> None:
    other = str(rows_file(tmp_path / "b.jsonl", ["20"]))
    for changes in ({"val_path": file}, {"val_path": [other, file]}, {"val_split": "train"}):
        with pytest.raises(UserError, match=r"a\.jsonl.* is validation and training at once: set data\.val_path to"):
            made(tmp_path, path=file, **changes)
    folder = str(rows_file(tmp_path / "f/train.jsonl", ["1"]).parent)
    with pytest.raises(UserError, match="is validation and training at once"):
        made(tmp_path, path=folder, val_path=f"{folder}/train.jsonl")


def test_slices_of_one_file_must_not_overlap(tmp_path: Path, file: str) -> None:
    both = made(tmp_path, path=file, split="train[:80%]", val_split="train[80%:]")
    assert both.val is not None
    assert (len(both.train), len(both.val)) == (8, 2)
    for split, val_split in (("train[:8]", "train[7:]"), ("train", "train[:2]"), ("train[:2]", "train")):
        with pytest.raises(
            UserError, match=r"share rows of .*a\.jsonl: write slices that don't overlap, such as train"
        ):
            made(tmp_path, path=file, split=split, val_split=val_split)


def test_a_folder_and_a_file_of_its_own(tmp_path: Path, file: str) -> None:
    rows_file(tmp_path / "f/train.jsonl", ["1", "2", "3"])
    rows_file(tmp_path / "f/test.jsonl", ["4"])
    both = made(tmp_path, path=str(tmp_path / "f"), val_split="test")
    assert both.val is not None
    assert (len(both.train), len(both.val)) == (3, 1)
    both = made(
        tmp_path, path=str(tmp_path / "f"), val_path=str(rows_file(tmp_path / "b.jsonl", ["7"])), val_split="test"
    )
    assert both.val is not None
    assert len(both.val) == 1


def test_rows_of_validation_that_are_also_in_training_are_counted(tmp_path: Path, file: str) -> None:
    lines: list[str] = []
    both = made(tmp_path, lines, path=file, val_path=str(rows_file(tmp_path / "b.jsonl", ["3", "50", "4"])))
    assert "2 of 3 validation samples are also in training" in lines
    assert both.ledger["validation"]["also_in_training"] == 2
    assert num_in_both(np.array([1, 2], np.uint64), np.array([], np.uint64)) == 0


def test_one_or_two_rows_get_advice_that_can_be_followed(tmp_path: Path) -> None:
    one = str(rows_file(tmp_path / "one.jsonl", ["1"]))
    with pytest.raises(
        UserError, match=r"^0\.05 of 1 sample cannot be .*: set data\.val_size=0 for none, or data\.val_p"
    ):
        made(tmp_path, path=one)
    assert len(made(tmp_path, path=one, val_size=0).train) == 1
    two = str(rows_file(tmp_path / "two.jsonl", ["1", "2"]))
    with pytest.raises(
        UserError, match=r"^0\.05 of 2 samples cannot .*: set data\.val_size to a number of samples from 1"
    ):
        made(tmp_path, path=two)
    assert len(made(tmp_path, path=two, val_size=1).train) == 1
