"""Which process is which, and how one of several ends."""

import multiprocessing
import os
import sys
import threading
from pathlib import Path
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


def machine() -> str | None:
    """The machine since it was started, and the container, in which a process's number means one process."""
    try:
        return f"{_boot()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def live_process(pid: int) -> str | None:
    """Tells a live process from earlier ones of the same number; None where there is no such process, or no /proc."""
    try:
        fields, boot = _stat(pid), _boot()
    except OSError:
        return None
    # A killed process whose parent has not collected it yet is a zombie, and still listed.
    return None if fields[0] == "Z" else f"{boot} {pid} {fields[19]}"


def is_stopped(pid: int) -> bool:
    """Whether a process can't run until it is continued."""
    try:
        return _stat(pid)[0] in "Tt"
    except OSError:
        return False


def _stat(pid: int) -> list[str]:
    """The fields of a process from its state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
