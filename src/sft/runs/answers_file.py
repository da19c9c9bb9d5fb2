"""`samples.jsonl`: the answers to a few held-out prompts after each validation, one JSON line an answer."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from sft.runs.files import fsync, write_text


class Answer(TypedDict):
    """An answer at one step. `number` tells the prompts apart: they are the same at each step."""

    step: int  # optimizer steps done; 0: the model before training
    number: int
    source: str
    row: int
    prompt: str
    reference: str
    base: str | None  # the answer of the model before training; None where nobody asked it
    answer: str
    score: float  # of `evaluation.scorer`, 0 to 1
    base_score: float | None
    num_tokens: int  # of the answer, its stop token included
    num_reference_tokens: int
    stopped: bool  # by a stop token; else it was cut


def read(folder: Path) -> list[Answer]:
    """A run's answers, oldest first; a line cut short is left out."""
    answers = []
    for line in _text(folder).split("\n"):  # `splitlines` knows ends of lines that JSON doesn't escape
        with suppress(ValueError):
            answers.append(json.loads(line))
    return answers


def keep_until(folder: Path, step: int) -> None:
    """Drops the answers after `step`, which a resumed run gives again, and a line cut short; with step 0 all."""
    kept = "".join(_line(answer) for answer in read(folder) if 0 < step >= answer["step"])
    if kept != _text(folder):
        write_text(folder / "samples.jsonl", kept)


def append(folder: Path, answers: list[Answer]) -> None:
    """They are on the disk afterwards: a checkpoint must not outlive the answers up to its step."""
    with (folder / "samples.jsonl").open("a") as file:
        file.write("".join(map(_line, answers)))
    fsync(folder / "samples.jsonl")


def _text(folder: Path) -> str:
    try:
        return (folder / "samples.jsonl").read_text()
    except FileNotFoundError:
        return ""


def _line(answer: Answer) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"
