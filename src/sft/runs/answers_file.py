"""`samples.jsonl`: the answers to a few held-out prompts after each validation, one JSON line an answer."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from sft.runs.files import write_text


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
    try:
        lines = (folder / "samples.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return []
    answers = []
    for line in lines:
        with suppress(ValueError):
            answers.append(json.loads(line))
    return answers


def keep_until(folder: Path, step: int) -> None:
    """Drops the answers after `step`, which a resumed run gives again; with step 0 all."""
    answers = read(folder)
    kept = [answer for answer in answers if 0 < step >= answer["step"]]
    if len(kept) < len(answers):
        write_text(folder / "samples.jsonl", "".join(map(_line, kept)))


def append(folder: Path, answers: list[Answer]) -> None:
    with (folder / "samples.jsonl").open("a") as file:
        file.write("".join(map(_line, answers)))


def _line(answer: Answer) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"
