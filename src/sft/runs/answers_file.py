"""`samples.jsonl`: the answers to a few held-out prompts after each validation, one JSON line an answer."""

import json
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import TypedDict, cast

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


KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("step", "number", "row", "num_tokens", "num_reference_tokens"), (int,)),
    **dict.fromkeys(("source", "prompt", "reference", "answer"), (str,)),
    **{"base": (str, NoneType), "score": (float, int), "base_score": (float, int, NoneType), "stopped": (bool,)},
}


def read(folder: Path) -> list[Answer]:
    """A run's answers, oldest first; a line that is cut short or damaged is left out."""
    answers = []
    for line in _text(folder).split("\n"):  # `splitlines` knows ends of lines that JSON doesn't escape
        with suppress(ValueError, RecursionError):
            answer = json.loads(line)
            if isinstance(answer, dict) and all(
                name in answer and type(answer[name]) in kinds for name, kinds in KINDS.items()
            ):
                answers.append(cast(Answer, answer))
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
        return (folder / "samples.jsonl").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _line(answer: Answer) -> str:
    return json.dumps(answer, ensure_ascii=False) + "\n"
