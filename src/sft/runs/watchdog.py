"""Ends a rank that hangs: a small process of its own (`watcher.py`) waits for its signs of life. It counts only seconds
in which the rank could have run: after SIGSTOP, `scontrol suspend` or a machine's sleep it starts anew.

Neither of its two signals needs Python to run here. First SIGUSR2 has the interpreter write the stacks of all threads.
A little later, when all ranks have written theirs, SIGALRM kills the process. Ranks that wait for a hung one hang too,
so each leaves its stack.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from sft.runs import signals

OFTEN = 0.2  # seconds between two signs of life that are passed on

step = 0  # optimizer steps done at the last sign of life

_watcher: "subprocess.Popen[bytes] | None" = None
_file: IO[str] | None = None
_passed_on = 0.0


def start(path: Path, hang_after: float) -> None:
    """From now on `hang_after` seconds without a `beat` end this process, its stacks written to `path`; 0: never."""
    global _file, _watcher
    if hang_after:
        path.parent.mkdir(parents=True, exist_ok=True)
        _file = path.open("w")
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGUSR2, _file)
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watcher.py"))]
        with signals.shielded((*signals.SIGNALS, *signals.BY_HAND)):  # it ends with this process, not before
            _watcher = subprocess.Popen(
                [*command, str(os.getpid()), str(hang_after)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                bufsize=0,
            )
        assert _watcher.stdin is not None
        os.set_blocking(_watcher.stdin.fileno(), False)


def beat(steps_done: int | None = None) -> None:
    """A sign of life, with the number of optimizer steps done if it has changed."""
    global step, _passed_on
    step = step if steps_done is None else steps_done
    if _watcher is not None and _watcher.stdin is not None and (now := time.monotonic()) - _passed_on > OFTEN:
        _passed_on = now
        with suppress(OSError):  # it is suspended, and has not read the earlier ones
            _watcher.stdin.write(b".")


def stop() -> None:
    """Ends the watch, and removes the file of stacks if it is empty."""
    global _file, _watcher
    if _watcher is not None:
        _watcher.kill()
        _watcher.communicate()
        _watcher = None
    if _file is not None:
        faulthandler.unregister(signal.SIGUSR2)
        _file.close()
        path, _file = Path(_file.name), None
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # other ranks' files are in it
                path.parent.rmdir()
