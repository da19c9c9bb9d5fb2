"""How a process of several ends."""

import multiprocessing
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Ends this process without the interpreter's own end, which threads of a process group can crash or hang."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with_parent() -> None:
    """From now on this process ends when its multiprocessing parent does, killed or not, whatever it waits for."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
