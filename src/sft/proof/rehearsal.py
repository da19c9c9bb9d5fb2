"""The commands of a rehearsal: each runs in its own processes, is read line by line, and says why it failed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from sft.proof.rank_pool import LAUNCHERS
from sft.runs.provenance import is_library


@dataclass(eq=False)
class SignalInStep(Callback):
    """Sends a signal to one rank in the middle of an optimizer step, counted from 1, as a scheduler may."""

    step: int
    rank: int = 0
    name: str = "SIGUSR1"

    def on_train_batch_start(self, trainer: L.Trainer, module: object, batch: object, batch_idx: int) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), signal.Signals[self.name])


class Failed(Exception):
    """A command of the rehearsal failed."""


class Mistaken(Failed):
    """It failed by a mistake of the user's."""


def run_command(
    arguments: list[str], log: Path, on_line: Callable[[str], None], timeout: float, exit_code: int = 0
) -> None:
    """Runs `sft ARGUMENTS`, its output going to `log` and, line by line, to `on_line`.

    Raises:
        Failed: it did not end within `timeout` seconds, or not with `exit_code`.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    environment |= {"WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "SFT_TRACEBACK": "1"}
    script = Path(sys.executable).with_name("sft")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # so that all its ranks can be killed at once
        )
    deadline = time.monotonic() + timeout
    try:
        with log.open(errors="replace") as file:
            line, ended = "", False
            while not ended:
                ended = process.poll() is not None  # asked before reading: the last lines are read, too
                while part := file.readline():
                    line += part
                    if line.endswith("\n"):
                        on_line(line.rstrip())
                        line = ""
                if not ended and time.monotonic() > deadline:
                    raise Failed(f"it did not end within {timeout:g} seconds")
                time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != exit_code:
        raise failure(log.read_text(errors="replace"), process.returncode)


def failure(output: str, exit_code: int) -> Failed:
    """Why a command failed, by its output: the line for a user's mistake, or the first exception and its place."""
    lines = output.splitlines()
    mistakes = [line for line in lines if line.startswith("sft: ")]
    if mistakes and exit_code == 2:
        return Mistaken(mistakes[0].removeprefix("sft: "))
    frames: list[tuple[str, str, str]] = []
    for line in lines:
        if frame := re.match(r'\s+File "([^"]+)", line (\d+), in (\S+)', line):
            file, number, function = frame.groups()
            frames.append((file, number, function))
        # Other ranks may only report that this one has failed.
        elif frames and re.match(r"[\w.]+(: |$)", line) and not re.search(r"rank \d+ has failed", line):
            file, number, function = ([frame for frame in frames if not is_library(frame[0])] or frames)[-1]
            return Failed(f"{line[:500]} ({file}, line {number}, in {function})")
    if exit_code < 0:
        return Failed(f"it was killed by {signal.Signals(-exit_code).name}")
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return Failed(f"it ended with exit code {exit_code}: {last[:500]}")
