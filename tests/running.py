"""Runs of `sft` in a folder of their own, on a model that trains in a second."""

import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from sft import cli
from sft.runs import signals

# Each child is forked from a server that has imported what takes seconds and done nothing with it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["lightning", "deepspeed", "datasets", "transformers.models.llama.modeling_llama", "sft.training.module"]
)


@dataclass
class Ended:
    code: int  # negative: the signal that killed it
    output: str


def _main(folder: str, output: str, before: str, arguments: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ |= environment
    if "RANK" in environment:
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = int(environment["RANK"])  # the server imported it as the only process
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    exec(before, {})
    sys.argv = arguments
    cli.main()


class Sft:
    """Calls the command line in `folder`, in this process (fast) or in one of its own (to be killed)."""

    def __init__(self, folder: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.chdir(folder)
        monkeypatch.delenv("SFT_CACHE", raising=False)
        # 60 rows, 3 of them held out, 11 packs: 3 steps an epoch, the last of 3 packs instead of 4.
        self.settings = [
            f"model.path={model}",
            f"data.path={data}",
            "data.max_length=256",
            "data.num_workers=1",
            "global_batch_size=4",
            "micro_batch_size=2",
            "optimizer.lr=1e-2",
            "trainer=cpu",
            "logger=csv",
        ]

    def __call__(self, command: str, *arguments: str) -> int:
        """Exit code of `sft COMMAND ARGUMENTS`, run here."""
        handlers = {each: signal.getsignal(each) for each in signals.SIGNALS}
        with self.monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["sft", command, *arguments])
            try:
                cli.main()
            except SystemExit as end:
                return int(end.code or 0)
            finally:
                for each, handler in handlers.items():
                    signal.signal(each, handler)
        return 0

    def train(self, *arguments: str) -> int:
        return self("train", *self.settings, *arguments)

    def process(self, *arguments: str, before: str = "") -> "Ended":
        """The same in a process of its own, after the Python statements `before`."""
        (ended,) = self._started([{}], before, arguments)
        return ended

    def ranks(self, num: int, *arguments: str, before: str = "", folder: Path | None = None) -> "Ended":
        """The same on several ranks, started as a cluster does; what the first of them printed."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        at = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(num)}
        places = [{**at, "LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in range(num)]
        ended = self._started(places, before, (*arguments, f"trainer.devices={num}"), folder)
        codes = {each.code for each in ended}
        assert len(codes) == 1, "\n".join(each.output for each in ended)
        return ended[0]

    def _started(
        self, places: list[dict[str, str]], before: str, arguments: tuple[str, ...], folder: Path | None = None
    ) -> "list[Ended]":
        folder = folder or self.folder
        outputs = [self.folder / f"output{number}.txt" for number in range(len(places))]
        children = [
            PROCESSES.Process(target=_main, args=(str(folder), str(output), before, ["sft", *arguments], place))
            for place, output in zip(places, outputs, strict=True)
        ]
        for child in children:
            child.start()
        running = list(children)
        while running:
            wait([child.sentinel for child in running])
            running = [child for child in running if child.exitcode is None]
            if any(child.exitcode for child in children):  # the others would wait for it
                for other in running:
                    other.join(timeout=20)
                    other.kill()
                    other.join()
                running = []
        return [
            Ended(int(child.exitcode or 0), output.read_text()) for child, output in zip(children, outputs, strict=True)
        ]

    def run_folder(self, name: str = "run") -> Path:
        return self.folder / "runs" / name
