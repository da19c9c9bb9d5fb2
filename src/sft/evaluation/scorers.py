"""How well an answer agrees with its reference: functions of (answer, reference) that give 0 to 1.

`evaluation.scorer._target_` names one of these, or one of your own.
"""

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from sft.runs.answers_file import Answer

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact(answer: str, reference: str) -> float:
    """1 if both are the same but for space around them."""
    return float(answer.strip() == reference.strip())


def similarity(answer: str, reference: str) -> float:
    """Twice the number of characters that match in order, over the number of both (`difflib.SequenceMatcher.ratio`)."""
    return SequenceMatcher(None, answer.strip(), reference.strip(), autojunk=False).ratio()


def final_number(answer: str, reference: str) -> float:
    """1 if the last number of both is the same, as in GSM8K; where the reference has none, 1 if both are the same."""
    ours, theirs = (NUMBER.findall(text) for text in (answer, reference))
    if not theirs:
        return exact(answer, reference)
    return float(bool(ours) and _value(ours[-1]) == _value(theirs[-1]))


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def measures(answers: Sequence[Answer]) -> dict[str, float]:
    """The columns of a validation, by name; sft/runs/metric.py has their formulas."""
    num = len(answers)
    bases = [each["base_score"] for each in answers if each["base_score"] is not None]
    # Of an answer that was cut, its reference counts as far as the answer reaches.
    references = [
        each["num_reference_tokens"] if each["stopped"] else min(each["num_tokens"], each["num_reference_tokens"])
        for each in answers
    ]
    return {
        "answers/score": sum(each["score"] for each in answers) / num,
        "answers/exact": sum(exact(each["answer"], each["reference"]) for each in answers) / num,
        **({"answers/base_score": sum(bases) / len(bases)} if bases else {}),
        "answers/stopped": sum(each["stopped"] for each in answers) / num,
        "answers/length_ratio": sum(each["num_tokens"] for each in answers) / sum(references),
    }
