"""What the demo's figures rest on: no leak from test to training, and no instruction in the pre-training text."""

import json
import re
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import demo_assets


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "demo"
    assert demo_assets.write_assets(folder, seed=0)
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked_about(row: dict[str, str]) -> str:
    """The word of a prompt: what is left of it when its phrasing is taken away."""
    for phrasing in demo_assets.TASKS[row["task"]].prompts:
        before, after = phrasing.split("{word}")
        if row["prompt"].startswith(before) and row["prompt"].endswith(after):
            return row["prompt"][len(before) : len(row["prompt"]) - len(after)]
    raise AssertionError(row)


def test_no_word_of_the_test_is_in_any_training_text(world: Path) -> None:
    held_out = {asked_about(row) for row in rows(world / "test.jsonl")}
    seen: set[str] = set()
    for name in ("pretrain", "pretrain_val", "train"):
        seen.update(re.findall(r"[a-z]+", (world / f"{name}.jsonl").read_text().lower()))
    assert len(held_out) > 300
    assert not held_out & seen
    assert not {word[::-1] for word in held_out} & seen


def test_references_are_right(world: Path) -> None:
    expected = {
        "capitals": lambda word: word.upper(),
        "backwards": lambda word: "".join(reversed(word)),
        "spell": lambda word: "-".join(list(word)),
        "double": lambda word: re.sub("(.)", r"\1\1", word),
        "count": lambda word: str(len(word)),
        "first": lambda word: word[:1],
        "last": lambda word: word[-1:],
    }
    for row in rows(world / "test.jsonl") + rows(world / "train.jsonl")[:700]:
        assert row["response"] == expected[row["task"]](asked_about(row))


def test_pre_training_never_shows_the_form_of_an_instruction(world: Path) -> None:
    text = (world / "pretrain.jsonl").read_text()
    openings = {phrasing.split("{word}")[0].strip() for task in demo_assets.TASKS.values() for phrasing in task.prompts}
    assert not [opening for opening in openings if opening in text]
    assert "<|im_start|>" not in text


def test_written_once_and_the_same_everywhere(world: Path, tmp_path: Path) -> None:
    assert not demo_assets.write_assets(world, seed=0)
    demo_assets.write_assets(tmp_path / "again", seed=0)
    for name in ("pretrain.jsonl", "train.jsonl", "test.jsonl", "tokenizer/tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
    assert demo_assets.write_assets(world, seed=1)  # another world takes its place
    assert demo_assets.write_assets(world, seed=0)


def test_a_folder_that_is_no_world_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(FileExistsError):
        demo_assets.write_assets(tmp_path / "mine", seed=0)


def test_tokenizer_encodes_every_text(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    text = "Ünïcode 漢字 🧮 <tag> $3.50\n\ttab"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
