"""DeepSpeed's optimizer for the host is compiled once, before training; a lock that a killed compilation has left is
removed.

torch takes a file for the lock of an extension's build folder: where its process was killed the file stays, and all
others would wait for its end for ever.
"""

import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig

from sft.errors import UserError

QUIET = 600.0  # seconds without a new file, after which a compilation on another machine is taken for dead
LINE = 30.0  # seconds between two lines of a process that waits
# File systems that one machine alone has: nobody else holds a lock there.
OWN = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "ramfs", "overlay")
NAME = "cpu_adam"


def offloads(config: DictConfig) -> bool:
    """Whether the strategy keeps the optimizer's states in the host's memory, where DeepSpeed's own AdamW runs."""
    settings = (config.get("strategy") or {}).get("config") or {}
    return "offload_optimizer" in (settings.get("zero_optimization") or {})


def is_compiled() -> bool:
    """Whether this user has it already, as far as that is known without torch."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    files = Path(folder).glob(f"{NAME}/*.so") if folder else caches.glob(f"torch_extensions/*/{NAME}/*.so")
    return any(files)


def compile_optimizer(log: Callable[[str], None]) -> None:
    """Compiles and loads DeepSpeed's AdamW for the host: about a minute the first time, and a second later. Of several
    processes one compiles at a time. UserError where it can't be compiled."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    find_ninja()
    begun = time.monotonic()
    if not is_compiled():
        log("DeepSpeed's AdamW for the host is compiled, once: about a minute")
    try:
        with no_endless_wait(log):
            CPUAdamBuilder().load(verbose=False)
    except (RuntimeError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if "error: " in line]
        reason = " ".join((lines or [str(error)])[0].split())[:300]
        raise UserError(
            f"DeepSpeed's AdamW for the host can't be compiled ({reason}): make a C++ compiler available, as by module "
            "load gcc, or choose a strategy without offload"
        ) from error
    if (took := time.monotonic() - begun) > 10:
        log(f"compiled in {took:.0f} s")


@contextmanager
def no_endless_wait(log: Callable[[str], None]) -> Iterator[None]:
    """torch's extensions are loaded by one process after the other, and none waits for one that is dead."""
    from torch.utils import cpp_extension
    from torch.utils.file_baton import FileBaton

    class Baton(FileBaton):
        def try_acquire(self) -> bool:
            # Never in vain: who only waited would take for built what a killed process hasn't.
            while not super().try_acquire():
                wait(Path(self.lock_file_path), log)
            return True

    cpp_extension.FileBaton = Baton  # type: ignore[attr-defined]
    try:
        yield
    finally:
        cpp_extension.FileBaton = FileBaton  # type: ignore[attr-defined]


def wait(lock: Path, log: Callable[[str], None]) -> None:
    """Until the lock is gone: given back, or left by a process that is dead, and then removed."""
    since = time.monotonic()
    newest, changed, next_line = 0.0, since, LINE
    while lock.exists():
        if (now := _newest(lock.parent)) != newest:
            newest, changed = now, time.monotonic()
        with _alone(lock.parent):
            if is_left(lock, time.monotonic() - changed):
                lock.unlink(missing_ok=True)
                print(f"removed {lock}: the compilation that held it was killed", flush=True)
                return
        time.sleep(0.2)
        if (waited := time.monotonic() - since) > next_line:
            log(f"waiting {waited:.0f} s for the compilation in {lock.parent}")
            next_line += LINE


def is_left(lock: Path, watched: float) -> bool:
    """Whether nobody holds the lock: no process of this machine, and none of another.

    A holder has the file open; a compiler that outlives it works in its folder. Of another machine on the same file
    system only what it writes is seen: nothing for `QUIET` seconds by the files' times, or for as long as we `watched`.
    """
    try:
        file = lock.stat()
    except FileNotFoundError:
        return False
    if any(_works(process, file, lock.parent) for process in Path("/proc").glob("[0-9]*")):
        return False
    return _is_own(lock.parent) or max(watched, time.time() - _newest(lock.parent)) > QUIET


def _works(process: Path, lock: os.stat_result, folder: Path) -> bool:
    with suppress(OSError):  # it has ended, or is another user's
        if process.joinpath("cwd").samefile(folder):
            return True
        for descriptor in process.joinpath("fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(descriptor.stat(), lock):
                    return True
    return False


def _newest(folder: Path) -> float:
    """Time of the last change of any file there; 0 if there is none."""
    newest = 0.0
    for path in folder.rglob("*"):
        with suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    return newest


def _is_own(folder: Path) -> bool:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    _, kind = max((len(place), kind) for place, kind in mounts if folder.resolve().is_relative_to(place))
    return kind in OWN


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Of the processes of a machine one looks and removes at a time: a second must not remove the lock that a third has
    taken since."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems lock no folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def find_ninja() -> None:
    """torch looks for it in PATH; it is beside this Python."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
