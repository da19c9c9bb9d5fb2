"""How a rehearsal's commands are run: in processes of their own, watched line by line, and asked why they failed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

# What a launcher or a batch system has put there would make a rehearsal think itself a part of their job.
FOREIGN = re.compile(
    r"^((SLURM|SLURMD|PMI|PMIX|OMPI|TORCHELASTIC)_.*|(|LOCAL_|NODE_|GROUP_)RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT))$"
)


class SignalInStep(Callback):
    """Sends a signal to one rank in the middle of an optimizer step, as a scheduler may.

    Args:
        step: counted from 1.
        rank: that gets the signal.
        name: of the signal.
    """

    def __init__(self, step: int, rank: int = 0, name: str = "SIGUSR1") -> None:
        self.step, self.rank, self.number = step, rank, signal.Signals[name]

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        first = batch_idx % trainer.accumulate_grad_batches == 0
        if first and trainer.global_step == self.step - 1 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


class Failed(Exception):
    """A command of the rehearsal ended otherwise than it should."""

    def __init__(self, reason: str, users: bool) -> None:
        super().__init__(reason)
        self.users = users  # a mistake of the user's, and no failure


def run(arguments: list[str], log: Path, seen: Callable[[str], None], timeout: float, expected: int = 0) -> None:
    """Runs `sft ARGUMENTS` with its output going to `log` and, line by line, to `seen`; `Failed` where it fails."""
    environment = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    environment |= {"WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    script = Path(sys.executable).with_name("sft")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,  # to end all its ranks at once
        )
    deadline = time.monotonic() + timeout
    try:
        with log.open(errors="replace") as file:
            line, ended = "", False
            while True:
                line += file.readline()
                if line.endswith("\n"):
                    seen(line.rstrip())
                    line = ""
                elif ended:
                    break
                elif time.monotonic() > deadline:
                    raise Failed(f"it did not end within {timeout:g} seconds", users=False)
                else:
                    ended = process.poll() is not None
                    time.sleep(0.05)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode != expected:
        raise explain(log.read_text(errors="replace"), process.returncode)


def explain(output: str, exit_code: int) -> Failed:
    """Why a command failed, from what it printed: the line for a user's mistake, or the first exception and where."""
    lines = output.splitlines()
    mistakes = [line for line in lines if line.startswith("sft: ")]
    if mistakes:
        return Failed(mistakes[0].removeprefix("sft: "), users=True)
    frames: list[tuple[str, str, str]] = []
    for line in lines:
        if frame := re.match(r'\s+File "([^"]+)", line (\d+), in (\S+)', line):
            frames.append(frame.groups())  # type: ignore[arg-type]
        # Other ranks may only tell that this one has failed.
        elif frames and re.match(r"[\w.]+(: |$)", line) and not re.search(r"rank \d+ has failed", line):
            file, number, function = max(frames, key=_nearness)
            return Failed(f"{line[:500]} ({file}, line {number}, in {function})", users=False)
    if exit_code < 0:
        return Failed(f"it was killed by {signal.Signals(-exit_code).name}", users=False)
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return Failed(f"it ended with exit code {exit_code}: {last[:500]}", users=False)


def _nearness(frame: tuple[str, str, str]) -> int:
    """To what the user has written: their own files, then this project's, then libraries'."""
    file = frame[0]
    if file.startswith((sys.prefix, sys.base_prefix)) or "site-packages" in file or file.startswith("<"):
        return 0
    return 1 if file.startswith(str(Path(__file__).resolve().parents[1])) else 2
