"""How well an answer agrees with its reference: functions of (answer, reference) that give 0 to 1.

`evaluation.scorer._target_` names one of these, or one of your own.
"""

from difflib import SequenceMatcher


def exact(answer: str, reference: str) -> float:
    """1 if both are the same but for space around them."""
    return float(answer.strip() == reference.strip())


def similarity(answer: str, reference: str) -> float:
    """Twice the number of characters that match in order, over the number of both (`difflib.SequenceMatcher.ratio`)."""
    return SequenceMatcher(None, answer.strip(), reference.strip(), autojunk=False).ratio()
