"""The processes that stand for Python in the tests."""

import socket
import subprocess
from pathlib import Path

import warm


def test_a_client_that_is_killed_before_it_asks_leaves_nothing_behind() -> None:
    python = warm.python()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(str(Path(python.executable).with_name("server")))
    assert subprocess.run([python.executable, "-m", "this"], capture_output=True, text=True).returncode == 0
