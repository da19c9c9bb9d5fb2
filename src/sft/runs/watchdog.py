"""Ends a rank that hangs: each sign of life postpones two timers, and neither needs Python to run.

First the interpreter's own watchdog thread writes the stacks of all threads. A little later, when all ranks have
written theirs, the kernel's alarm kills the process. Ranks that wait for a hung one hang too, so each leaves its stack.
"""

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import IO

step = 0  # optimizer steps done at the last sign of life

_hang_after = 0.0
_file: IO[str] | None = None


def start(path: Path, hang_after: float) -> None:
    """From now on `hang_after` seconds without a `beat` end this process, its stacks written to `path`; 0: never."""
    global _hang_after, _file
    if hang_after:
        path.parent.mkdir(parents=True, exist_ok=True)
        _hang_after, _file = hang_after, path.open("w")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        beat()


def beat(steps_done: int | None = None) -> None:
    """A sign of life, with the number of optimizer steps done if it has changed."""
    global step
    step = step if steps_done is None else steps_done
    if _file is not None:
        faulthandler.dump_traceback_later(_hang_after, file=_file)
        signal.setitimer(signal.ITIMER_REAL, _hang_after + min(60, _hang_after / 4))


def stop() -> None:
    """Ends the watch, and removes the file of stacks if it is empty."""
    global _file
    if _file is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        _file.close()
        path, _file = Path(_file.name), None
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # other ranks' files are in it
                path.parent.rmdir()
