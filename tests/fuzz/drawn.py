"""What the fuzz draws, and for how long: in the suite a few cases that are always the same; with `SFT_FUZZ_MINUTES=10`
new ones for as many CPU-minutes a target."""

import os
import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

MINUTES = float(os.environ.get("SFT_FUZZ_MINUTES", 0))


def fuzz(case: Callable[[], None], num_cases: int = 25) -> None:
    """Runs a function of hypothesis' `given`."""
    drawn = settings(
        max_examples=1000 if MINUTES else num_cases,
        derandomize=not MINUTES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )(case)
    begun = time.process_time()
    drawn()
    while time.process_time() - begun < 60 * MINUTES:
        drawn()


def said(error: Exception, part: str = "") -> None:
    """The error's message is one line that has this part."""
    assert str(error) and "\n" not in str(error) and part in str(error), str(error)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
objects = st.dictionaries(texts, values, max_size=4)


@st.composite
def mutated(draw: Any, originals: st.SearchStrategy[bytes]) -> bytes:
    """Some bytes changed, put in, repeated or cut off."""
    data = bytearray(draw(originals))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(("change", "insert", "remove", "cut", "repeat")))
        size = draw(st.integers(1, 8))
        if kind == "change":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=8) | st.sampled_from(SIGNS))
        elif kind == "remove":
            del data[at : at + size]
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = data[max(0, at - size) : at]
    return bytes(data)


# Bytes that formats mean something by.
SIGNS = [b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\n", b"\r", b"\t", b"\0", b"NaN", b"1e999", b"null", b"-"]
SIGNS += [b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", b"PAR1", b"\\ud800", b"\xed\xa0\x80", b"9" * 5000, b"[" * 2000]
