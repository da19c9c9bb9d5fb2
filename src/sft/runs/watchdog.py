"""What ends a rank that hangs: each sign of life postpones two timers, and neither needs Python to run.

The first has the interpreter's own watchdog thread write the stacks of all threads; the second, a little later so that
all ranks have written theirs, is the kernel's alarm, which kills the process. Ranks that wait for a hung one hang too,
so each leaves its stack.
"""

import faulthandler
import signal
from contextlib import suppress
from pathlib import Path
from typing import IO

step = 0  # optimizer steps that are done, of the last sign of life

_after = 0.0
_file: IO[str] | None = None


def start(path: Path, after: float) -> None:
    """From now on `after` seconds without a `beat` end this process, its stacks written to `path`; 0 for never."""
    global _after, _file
    if after:
        path.parent.mkdir(parents=True, exist_ok=True)
        _after, _file = after, path.open("w")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        beat()


def beat(done: int | None = None) -> None:
    """A sign of life; `done` optimizer steps are done."""
    global step
    step = step if done is None else done
    if _file is not None:
        faulthandler.dump_traceback_later(_after, file=_file)
        signal.setitimer(signal.ITIMER_REAL, _after + min(60, _after / 4))


def stop() -> None:
    """Nothing is waited for any longer."""
    global _file
    if _file is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        _file.close()
        path, _file = Path(_file.name), None
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # others' errors lie there
                path.parent.rmdir()
