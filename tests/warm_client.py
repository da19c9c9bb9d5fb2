"""Stands for Python in `warm.Python`: asks the server to run a module or a script in a process with this one's folder,
environment and files, and ends as that process does. It imports little, since all it is for is to start fast."""

import json
import os
import socket
import sys


def main(address: str, arguments: list[str]) -> None:
    if not arguments or (arguments[0].startswith("-") and arguments[0] != "-m"):
        os.execv(sys.executable, [sys.executable, *arguments])
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        request = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
        socket.send_fds(server, [request], [0, 1, 2])
        code = int(server.recv(16))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
