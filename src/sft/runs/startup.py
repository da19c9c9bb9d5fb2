"""Ranks of one machine that start together end together: one that dies before training begins ends the others, which
would wait for it, with its cause.

Each further rank holds a connection to the first, which the kernel closes when a process dies, however it does: no
time limit is needed, and a rank that is slow is no dead one. A launcher that ends all ranks itself is faster.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

TOGETHER = 10.0  # seconds in which ranks that are started by one command begin
GRACE = 2.0  # seconds for a rank to end by a mistake that all of them find
NAME = "SFT_START"  # in the environment of ranks that a first rank starts itself

_lock = threading.Lock()
_connections: dict[int, socket.socket] = {}  # by rank
_server: socket.socket | None = None
_awaited: set[int] = set()  # the ranks that this one is to meet
_met: set[int] = set()  # those that it has met
_over = True  # nothing is watched any more


def begin(world_size: int, launched: bool) -> None:
    """Knows from now on which ranks this machine has. `launched`: by whoever gave all of them one address, and each has
    called `join`; else this rank starts the others."""
    if world_size < 2:
        return
    if not launched:
        os.environ[NAME] = f"{os.getpid()}-{time.time_ns()}"
        join(0)
    elif _server is not None:
        _awaited.update(range(1, world_size))


def join(rank: int, environment: Mapping[str, str] = os.environ) -> None:
    """Watches the other ranks of this machine from now on: before anything slow, since one that dies before this is not
    missed."""
    global _server, _over
    if not sys.platform.startswith("linux"):
        return
    # Of no other start on this machine, which would get its ranks.
    start = environment[NAME] if NAME in environment else f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    place = f"\0sft-{os.getuid()}-{start}"
    _over = False
    if rank:
        _awaited.add(0)
        threading.Thread(target=_join, args=(place, rank), daemon=True).start()
        return
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(place)
        server.listen(64)
    except OSError:  # another start has this address, and its ranks will say so
        server.close()
        return
    _server = server
    threading.Thread(target=_accept, args=(server,), daemon=True).start()


def leave() -> None:
    """Training begins, or this rank has nothing more to do: its end is no other's any more."""
    _say({})


def tell(message: str, code: int) -> None:
    """This rank ends by an error, which the others wait for in vain, those too that are about to begin."""
    deadline = time.monotonic() + TOGETHER
    with suppress(KeyboardInterrupt):
        while not _over and _awaited - _met and time.monotonic() < deadline:
            time.sleep(0.05)
    _say({"message": message, "code": code})


def _say(words: Mapping[str, object]) -> None:
    global _over, _server
    with _lock:
        _over = True
        _awaited.clear()
        _met.clear()
        for connection in _connections.values():
            with suppress(OSError):
                connection.sendall(json.dumps(words).encode() + b"\n")
                connection.shutdown(socket.SHUT_WR)
        _connections.clear()
        if _server is not None:
            with suppress(OSError):  # wakes the thread that accepts
                _server.shutdown(socket.SHUT_RDWR)
            _server.close()
            _server = None


def _join(place: str, rank: int) -> None:
    while not _over:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(place)
            connection.sendall(f"{rank}\n".encode())
        except OSError:  # the first rank isn't there yet
            connection.close()
            time.sleep(0.2)
            continue
        _listen(connection, connection.makefile(), 0)
        return


def _accept(server: socket.socket) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # it is closed
            return
        threading.Thread(target=_greet, args=(connection,), daemon=True).start()


def _greet(connection: socket.socket) -> None:
    lines = connection.makefile()  # one for all: it reads ahead
    with suppress(ValueError, OSError):
        _listen(connection, lines, int(lines.readline()))


def _listen(connection: socket.socket, lines: TextIO, rank: int) -> None:
    """Until the other rank leaves or dies."""
    with _lock:
        if _over:
            with suppress(OSError):
                connection.sendall(b"{}\n")
            connection.close()
            return
        _connections[rank] = connection
        _met.add(rank)
    words = ""
    with suppress(OSError):
        words = lines.readline().strip()
    said = json.loads(words) if words else {}
    if not words:
        _end(f"rank {rank} was killed, or crashed, before training began", 1)
    elif said:
        time.sleep(GRACE)
        message = str(said["message"])
        _end(message if message.startswith("rank ") else f"rank {rank}: {message}", int(said["code"]))
    with _lock:
        _connections.pop(rank, None)


def _end(message: str, code: int) -> None:
    if _over:
        return
    print(f"sft: {message}", file=sys.stderr, flush=True)
    tell(message, code)
    os._exit(code)  # the main thread may wait in a library that no exception reaches
