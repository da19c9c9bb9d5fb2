"""Processes that start in a fraction of a second: each is forked from a server that has imported what takes seconds
and has done nothing with it."""

import atexit
import fcntl
import gc
import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import socket
import sys
import tempfile
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock, Thread

import cpuinfo

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "lightning",
        "deepspeed",
        "datasets",
        "peft",
        "torch._inductor.compile_fx",  # for DeepSpeed's first step
        "torch.distributed.fsdp",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "sft.training.fit",
        "sft.training.datamodule",
        "sft.training.prepare",
        "sft.proof.cells",
        "sft.proof.reference",
        "composed",
    ]
)
# Where one is started multiprocessing looks at all of its processes, and the code of one that has ended is read once.
LOCK = Lock()


def start() -> None:
    """Starts the server; one that some other code started first would have imported less."""
    forkserver.ensure_running()


cpu_info = cache(cpuinfo.get_cpu_info)  # seconds, and DeepSpeed asks for it several times


def enter(executable: str, folder: str, environment: dict[str, str]) -> None:
    """Makes a process that was just forked like one that `executable` has started in this folder and environment."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    from sft.runs.process import exit_with_parent

    gc.freeze()  # what the server has imported is not looked through, which would copy its memory
    exit_with_parent()
    cpuinfo.get_cpu_info = cpu_info
    multiprocessing.set_start_method(None, force=True)  # the default, not another server
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", *sys.path)]
    sys.executable = executable
    rank_zero_only.rank = int(environment.get("RANK", environment.get("LOCAL_RANK", 0)))  # the server is the first


@cache
def python() -> "Python":
    """The one of this process."""
    folder = Path(tempfile.mkdtemp(prefix="sft-warm-"))
    atexit.register(shutil.rmtree, folder)
    return Python(folder)


@cache
def compile_cpu_adam() -> None:
    """DeepSpeed's Adam for the processor, where it isn't compiled yet: a minute."""
    process = PROCESSES.Process(target=_compile_cpu_adam)
    process.start()
    process.join()
    assert process.exitcode == 0, "DeepSpeed's CPU Adam can't be compiled"


def _compile_cpu_adam() -> None:
    from deepspeed.ops.op_builder import CPUAdamBuilder

    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where ninja is
    with (folder / "owner").open("w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)  # let go when its process ends, however it does
        for lock in folder.rglob("lock"):  # torch's own, which is left behind where a process is killed
            lock.unlink()
        CPUAdamBuilder().load(verbose=False)


class Python:
    """`folder/python` takes the place of `sys.executable`: a module (-m) or a script that is started by it runs in a
    process forked from the server. Beside it lies `sft`, the command line's script."""

    def __init__(self, folder: Path) -> None:
        self.executable, self.script = str(folder / "python"), str(folder / "sft")
        client = Path(__file__).with_name("warm_client.py")
        # -S -E: it needs no package.
        program = folder / "python"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{client}" "{folder}/server" "$@"\n')
        program.chmod(0o755)
        for name in ("sft", "ninja"):
            (folder / name).symlink_to(Path(sys.executable).with_name(name))
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.server.bind(f"{folder}/server")
        self.server.listen()
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            client, _ = self.server.accept()
            Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        request, descriptors, _, _ = socket.recv_fds(client, 1 << 20, 3)
        if not request:  # a client that was killed before it asked
            client.close()
            return
        files = [Connection(descriptor) for descriptor in descriptors]  # as which multiprocessing hands them over
        process = PROCESSES.Process(target=_run, args=(files, self.executable, *json.loads(request)))
        with LOCK:
            process.start()
        for file in files:
            file.close()
        wait([client, process.sentinel])  # there is nothing to read of a client but its end
        with LOCK:
            code = process.exitcode
        if code is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with client, suppress(OSError):
            client.send(str(code).encode())


def _run(
    files: list[Connection], executable: str, arguments: list[str], folder: str, environment: dict[str, str]
) -> None:
    os.setsid()
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has put /dev/null in its place
    enter(executable, folder, environment)
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def free_port() -> int:
    """A port of 127.0.0.1 below those that a system gives to whoever asks for any, so that none is given to another
    before it is used."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as trial, suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")
