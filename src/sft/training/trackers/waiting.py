"""No call to a tracker's server holds up a run for longer than it says."""

from collections.abc import Callable
from threading import Thread
from typing import TypeVar

from sft.errors import chain, disk_is_full

T = TypeVar("T")
U = TypeVar("U")


def within(seconds: float, call: Callable[[], T], otherwise: U) -> T | U:
    """What `call` returns, or `otherwise` if it takes longer: looking up a host's name has no timeout."""
    try:
        return bounded(seconds, call)
    except TimeoutError:
        return otherwise


def bounded(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError if it takes longer. It then goes on in its thread."""
    returned: list[T] = []
    raised: list[Exception] = []

    def run() -> None:
        try:
            returned.append(call())
        except Exception as error:
            raised.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"no answer in {seconds:g} seconds")
    return returned[0]


def line(error: BaseException) -> str:
    """An error in one line; a full disk is named, whatever a library makes of it."""
    error = next((link for link in chain(error) if disk_is_full(link)), error)
    return " ".join(str(error).split())[:200] or type(error).__name__
