"""Who trains a run: a lease in its folder, which its owner renews every few seconds. A second owner is refused; what a
crash has left is taken over.

Leases are numbered, and the highest is the owner's. Whoever takes a run makes the next number, which the file system
gives to one process alone: no `flock` is needed, which does nothing on some shared file systems. No clock of another
machine is believed either: an owner that can't be asked for is alive if its lease changes while it is watched.
"""

import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Required, cast

from sft.errors import UserError
from sft.runs import events
from sft.runs.events import SlurmJob
from sft.runs.files import TRIAL
from sft.runs.process import is_stopped, live_process, machine
from sft.runs.provenance import now

NAME = f"{TRIAL}lease-"
EVERY = 5.0  # seconds between two renewals
LOOKS = 60  # at a lease of another machine, a second apart: one that stays the same is left over from a crash
SIZE = 1024  # bytes of the file, which is written in place


class Owner(SlurmJob):
    """What a lease says."""

    owner: Required[str]  # a random name
    host: Required[str]
    machine: Required[str | None]  # whose processes can be asked for by number
    pid: Required[int]
    process: Required[str | None]
    cluster: Required[str | None]  # of the Slurm job
    begun: Required[str]
    seconds: Required[float]  # since then, by the owner's own clock: the heartbeat
    ended: Required[bool]  # it was given back


class Lost(UserError):
    """Another process has taken the run over."""


class Seen(NamedTuple):
    """A run's newest lease, by number, and whether its owner had given it back; (0, True) of a run without one."""

    number: int
    ended: bool


NONE = Seen(0, True)


@dataclass(frozen=True)
class Lease:
    """A lease as it was read."""

    path: Path
    written: bytes

    @property
    def number(self) -> int:
        return int(self.path.name.removeprefix(NAME))

    @property
    def owner(self) -> Owner | None:
        """None while it is being written, and where it is damaged."""
        try:
            owner = json.loads(self.written)
        except (ValueError, RecursionError):
            return None
        whole = isinstance(owner, dict) and owner.keys() >= Owner.__required_keys__
        numbers = whole and type(owner["pid"]) is int and type(owner["seconds"]) in (int, float)
        return cast(Owner, owner) if numbers else None

    @property
    def seen(self) -> Seen:
        return Seen(self.number, bool(self.owner and self.owner["ended"]))

    @property
    def alive(self) -> bool | None:
        """Whether its owner is; None where only watching it will tell."""
        owner, own = self.owner, events.job()
        if owner is None:
            return None
        if owner["ended"]:
            return False
        same_job = own and (owner["cluster"], owner.get("job")) == (_cluster(), own["job"])
        if same_job and owner.get("restart", 0) < own["restart"]:
            return False  # Slurm starts a job again only when its earlier attempt is over
        if not owner["process"] or owner["machine"] != machine():
            return None
        if owner["pid"] == os.getpid() and (_held is None or _held.path != self.path):
            return False  # an attempt of this very process, which could not give it back
        return live_process(owner["pid"]) == owner["process"]

    @property
    def state(self) -> str | None:
        """`running`, `suspended` or `died`; None where nobody on this machine can know."""
        if self.owner is None or not self.alive:
            return None if self.alive is None else "died"
        return "suspended" if is_stopped(self.owner["pid"]) else "running"

    @property
    def by(self) -> str:
        """Its owner, by host and age."""
        owner = self.owner
        if owner is None:
            return "another process"
        job = f" (job {owner['job']})" if "job" in owner else ""
        return f"process {owner['pid']} on {owner['host']}{job}, for {duration(owner['seconds'])}"


def newest(folder: Path) -> Lease | None:
    """The lease in force, held or given back."""
    while True:
        numbers = [int(number) for path in folder.glob(f"{NAME}*") if (number := path.name[len(NAME) :]).isdecimal()]
        if not numbers:
            return None
        path = folder / f"{NAME}{max(numbers)}"
        with suppress(FileNotFoundError):  # taken over since
            return Lease(path, path.read_bytes())


def look(folder: Path) -> Seen:
    """What a process that is about to read a run's checkpoints has to compare with when it takes the run. UserError
    where another process of this machine is training it."""
    lease = newest(folder)
    if lease is None:
        return NONE
    if lease.alive:
        raise _refusal(folder, lease)
    return lease.seen


@dataclass
class Held:
    """This process's lease."""

    path: Path
    owner: Owner
    begun: float  # by `_clock`
    renewed: float
    lost: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def renew(self) -> None:
        """Writes the heartbeat, or notices that the run was taken over. It only ever writes to the file that it has
        opened and known for its own, whatever has that name by then."""
        clock = _clock()
        self.owner["seconds"] = round(clock - self.begun, 3)
        try:
            descriptor = os.open(self.path, os.O_RDWR)
            try:
                there = Lease(self.path, os.pread(descriptor, SIZE, 0)).owner
                if _path(self.path.parent, self.number + 1).exists() or (
                    there and there["owner"] != self.owner["owner"]
                ):
                    self.lost = True
                else:
                    os.pwrite(descriptor, _text(self.owner), 0)
                    self.renewed = clock
            finally:
                os.close(descriptor)
        except OSError as error:  # else the disk is full, or away: another time
            self.lost |= error.errno in (errno.ENOENT, errno.ESTALE)

    @property
    def number(self) -> int:
        return Lease(self.path, b"").number

    def keep(self) -> None:
        while not self.ended.wait(EVERY) and not self.lost:
            self.renew()


_held: Held | None = None


def take(folder: Path, seen: Seen | None = None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Takes the run for this process, and renews the lease until `give_back`. Waits a minute for the heartbeat of an
    owner on another machine, if one has left a lease.

    UserError where another process is training the run, or has since it was `seen`.
    """
    global _held
    while True:
        before = newest(folder)
        if before and not _is_over(folder, before, sleep):
            continue
        if seen not in (None, before.seen if before else NONE):
            raise UserError(f"{folder} was trained by another process since this one began: start it again")
        owner: Owner = {
            **events.job(),
            "owner": secrets.token_hex(8),
            "host": socket.gethostname(),
            "machine": machine(),
            "pid": os.getpid(),
            "process": live_process(os.getpid()),
            "cluster": _cluster(),
            "begun": now(),
            "seconds": 0.0,
            "ended": False,
        }
        path = _path(folder, before.number + 1 if before else 1)
        if _make(path, owner):
            break
    _held = Held(path, owner, _clock(), _clock())
    threading.Thread(target=_held.keep, name="lease", daemon=True).start()
    for number in range(before.number if before else 0, 0, -1):
        try:
            _path(folder, number).unlink()
        except FileNotFoundError:
            break


def give_back() -> None:
    """This process trains the run no longer."""
    global _held
    if _held is not None:
        _held.ended.set()
        _held.owner["ended"] = True
        if not _held.lost:
            _held.renew()
        _held = None


def is_lost() -> bool:
    """Whether another process has taken over the run that this one trains. It costs nothing while the lease is renewed
    in time; after a pause the file is read, before anything is written to another's run."""
    if _held is None:
        return False
    if _clock() - _held.renewed > 2 * EVERY:
        _held.renew()
    return _held.lost


def check() -> None:
    """`Lost` if another process has taken over the run, by the file itself."""
    if _held is not None:
        _held.renew()
        if _held.lost:
            raise lost(_held.path.parent)


def lost(folder: Path) -> Lost:
    """The error of a process that has lost its run."""
    lease = newest(folder)
    by = f"taken over by {lease.by}" if lease else "removed"
    return Lost(f"{folder} was {by}, while this process stood still: it stops, and writes nothing more there")


def _is_over(folder: Path, lease: Lease, sleep: Callable[[float], None]) -> bool:
    """Whether a lease is no longer in force; False where it has changed so that it must be judged anew."""
    if lease.alive:
        raise _refusal(folder, lease)
    if lease.alive is False:
        return True
    said = False
    for _ in range(LOOKS):  # counted: a wait that was suspended proves nothing
        sleep(1)
        after = newest(folder)
        if after is None or after.seen != lease.seen or (lease.owner is None) != (after.owner is None):
            return False
        if after.written != lease.written:
            raise _refusal(folder, after)
        if not said:
            print(f"{folder} may still be trained by {lease.by}: watching for a minute whether it is", flush=True)
            said = True
    return True


def _refusal(folder: Path, lease: Lease) -> UserError:
    stopped = ", which is suspended" if lease.state == "suspended" else ""
    return UserError(f"{folder} is being trained by {lease.by}{stopped}: wait for it or stop it")


def _make(path: Path, owner: Owner) -> bool:
    """Makes a lease; False where another process was faster."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, _text(owner))
    finally:
        os.close(descriptor)
    newer = newest(path.parent)
    if newer and newer.path != path:  # what this one follows was followed, and cleaned up, long ago
        path.unlink(missing_ok=True)
        return False
    return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"{NAME}{number}"


def _text(owner: Owner) -> bytes:
    return json.dumps(owner).ljust(SIZE - 1).encode() + b"\n"


def _clock() -> float:
    """Seconds, those included in which the machine slept."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _cluster() -> str | None:
    return os.environ.get("SLURM_CLUSTER_NAME")


def duration(seconds: float) -> str:
    for unit, length in (("d", 86_400), ("h", 3_600)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 60:.0f} min"
