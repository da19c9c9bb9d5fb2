"""The folder in which a store is built, beside where it will be.

How far the build has come is written down every few seconds. A later build of the same store takes over the folder of
one that was killed: of this machine if the process is gone, of another if it hasn't written for a while (a copy, since
it might still wake up).
"""

import json
import os
import re
import secrets
import shutil
import socket
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from sft.data.ledger import Counts
from sft.data.samples import Samples
from sft.data.store import DTYPES, sum_weights
from sft.errors import UserError
from sft.runs import manifest
from sft.runs.files import fsync, write_json

SAVE_EVERY = 5.0  # seconds
GIVEN_UP = 600.0  # seconds without progress, after which a builder on another machine is taken for dead
WEIGHTS = "weights"  # is there only if a sample has some
BLOCK = 1 << 20  # tokens


@dataclass
class Progress:
    """What is done: all that is needed to continue."""

    num_pieces: int = 0
    num_tokens: int = 0
    counts: list[Counts] = field(default_factory=list)  # of each source that was begun
    sizes: dict[str, int] = field(default_factory=dict)  # of each file, in bytes


class Staging:
    """Opens the files of an unfinished store, and removes them unless the build can be continued."""

    def __init__(self, folder: Path) -> None:
        self.target = folder
        self.folder = folder.parent / f"{_prefix(folder)}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.store, self._progress_file = self.folder / "store", self.folder / "progress.json"
        self.progress = Progress()
        self._files: dict[str, IO[bytes]] = {}
        self._saved = time.monotonic()

    def __enter__(self) -> "Staging":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._take_over()
            self.store.mkdir(parents=True, exist_ok=True)
            for path in self.store.iterdir():
                if path.stem not in self.progress.sizes:  # begun after the progress was written down
                    path.unlink()
            for name in {**DTYPES, **self.progress.sizes}:
                self._files[name] = self._open(name)
            if not self.progress.sizes:
                self._files["offsets"].write(np.zeros(1, DTYPES["offsets"]).tobytes())
        except OSError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        killed_worker = isinstance(error, UserError) and isinstance(error.__cause__, BrokenProcessPool)
        can_continue = error is not None and (killed_worker or not isinstance(error, UserError))
        if not (can_continue and self._progress_file.exists()):
            self._remove()

    def write(self, samples: Samples) -> None:
        """Appends them. `progress` must count their rows afterwards."""
        offsets = self.progress.num_tokens + np.cumsum(samples.lengths, dtype=np.int64)
        self.progress.num_tokens += int(samples.lengths.sum(dtype=np.int64))
        if samples.weights is not None and WEIGHTS not in self._files:
            self._begin_weights()
        for name, values in {**samples.columns, "offsets": offsets.tobytes()}.items():
            self._files[name].write(values)
        if WEIGHTS in self._files:
            ones = np.frombuffer(samples.columns["supervised"], np.uint8).astype(np.float32)
            self._files[WEIGHTS].write(ones.tobytes() if samples.weights is None else samples.weights)

    def save(self) -> None:
        """Writes the progress down, now and then."""
        if time.monotonic() - self._saved < SAVE_EVERY:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self.progress.sizes = {name: file.tell() for name, file in self._files.items()}
        write_json(self._progress_file, asdict(self.progress))
        self._saved = time.monotonic()

    def publish(self, meta: dict[str, object]) -> None:
        """Makes the store appear, whole."""
        for file in self._files.values():
            file.close()
        sum_weights(self.store)
        (self.store / "meta.json").write_text(json.dumps(meta, indent=1))
        for path in (*self.store.iterdir(), self.store):
            fsync(path)
        manifest.write(self.store, manifest.entries(self.store, [path.name for path in self.store.iterdir()]))
        try:
            self.store.rename(self.target)
        except OSError:
            if not self.target.exists():
                raise
            # Another process was faster; its store is the same.
        fsync(self.target.parent)

    def _open(self, name: str) -> IO[bytes]:
        path = self.store / f"{name}.bin"
        if name in self.progress.sizes:
            os.truncate(path, self.progress.sizes[name])
        return path.open("ab")

    def _begin_weights(self) -> None:
        """Those of the samples so far: 1 where they carry loss."""
        self._files["supervised"].flush()
        self._files[WEIGHTS] = self._open(WEIGHTS)
        with (self.store / "supervised.bin").open("rb") as file:
            while block := file.read(BLOCK):
                self._files[WEIGHTS].write(np.frombuffer(block, np.uint8).astype(np.float32).tobytes())

    def _take_over(self) -> None:
        prefix = _prefix(self.target)
        for path in sorted(self.target.parent.glob(f"{prefix}*")):
            match = re.fullmatch(r"(.+)-(\d+)-[0-9a-f]{8}", path.name.removeprefix(prefix))
            if match is None:
                continue
            on_this_machine = match[1] == socket.gethostname()
            if on_this_machine and int(match[2]) != os.getpid() and _is_alive(int(match[2])):
                continue
            progress = None if self.progress.sizes else _read(path)
            try:
                if progress is not None and on_this_machine:
                    path.rename(self.folder)
                elif progress is not None and time.time() - (path / "progress.json").stat().st_mtime > GIVEN_UP:
                    _copy(path / "store", self.store, progress.sizes)
                elif not on_this_machine:
                    continue
            except OSError:  # another process was faster
                shutil.rmtree(self.folder, ignore_errors=True)
                continue
            if progress is not None:
                self.progress = progress
            elif on_this_machine:
                shutil.rmtree(path, ignore_errors=True)

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _prefix(folder: Path) -> str:
    return f".building-{folder.name}-"


def _read(path: Path) -> Progress | None:
    """How far a build came; None where that isn't known, or its files are not as long as that."""
    try:
        progress = Progress(**json.loads((path / "progress.json").read_text()))
        whole = all((path / f"store/{name}.bin").stat().st_size >= size for name, size in progress.sizes.items())
    except (OSError, ValueError, TypeError):
        return None
    return progress if whole else None


def _copy(store: Path, to: Path, sizes: dict[str, int]) -> None:
    to.mkdir(parents=True)
    for name, size in sizes.items():
        with (store / f"{name}.bin").open("rb") as source, (to / f"{name}.bin").open("wb") as target:
            while size and (block := source.read(min(size, BLOCK))):
                target.write(block)
                size -= len(block)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
