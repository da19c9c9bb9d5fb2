"""A call of a program that isn't ours, such as a chat template, ended where it runs for ever. In any thread and any
process, without a signal: the run's watchdog has the timer."""

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

TICK = 0.5  # seconds
_lock = threading.Lock()
_left: dict[int, int] = {}  # ticks, by thread. They are counted, so that time in which the process is stopped isn't
_clock: threading.Thread | None = None


class Endless(BaseException):
    """Raised in the call; no `except Exception` of its own holds it."""


def bounded(seconds: float, call: Callable[[], T]) -> T:
    """What the call returns; `Endless` after so many seconds. It ends between two steps of Python alone."""
    global _clock
    me = threading.get_ident()
    with _lock:
        _left[me] = round(seconds / TICK)
        if _clock is None or not _clock.is_alive():
            _clock = threading.Thread(target=_count, daemon=True)
            _clock.start()
    try:
        return call()
    finally:
        with _lock:
            _left.pop(me, None)
            _raise(me, None)  # that is on its way


def _count() -> None:
    global _clock
    while True:
        time.sleep(TICK)
        with _lock:
            for thread in list(_left):
                _left[thread] -= 1
                if _left[thread] < 0:
                    del _left[thread]
                    _raise(thread, Endless)
            if not _left:
                _clock = None
                return


def _raise(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


def _begin_anew() -> None:
    global _lock, _clock
    _lock, _clock = threading.Lock(), None
    _left.clear()


os.register_at_fork(after_in_child=_begin_anew)
