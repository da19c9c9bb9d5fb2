"""A check in a process of its own: what it is, how it is run, and what is left of it.

Processes are forked from a server that has imported what takes seconds and hasn't touched CUDA, so that a check costs
its own work and no more, and one that crashes or hangs takes nothing with it. Where the first of them, the device's,
finds that CUDA can't be used in a forked process, the others are started afresh.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["torch", "lightning", "transformers.models.llama.modeling_llama", "datasets", "hydra"]
PRELOADED += [
    "sft.model.sharded_loading",
    "sft.model.attention",
    "sft.cli",
    "sft.commands.export",
    "sft.data.dataset",
    "sft.training.fit",
    "sft.training.datamodule",
]
# What might touch CUDA; peft does where bitsandbytes is installed.
PRELOADED_CPU = ["deepspeed", "peft", "torch._inductor.compile_fx"]
LEAST = 5.0  # seconds with which it is worth beginning a check
OWN = ("sft", "checks", "benchmarks", "faults", "kernel", "demo_assets")  # modules that are not packages to install
SHOWN, KEPT = 12, 80  # last lines of one that fails, on the terminal and in gpu.json


class NotRun(Exception):
    """The check can't be made here, for this reason."""


class Failed(Exception):
    """The check found something wrong."""


def only_trace() -> None:
    """From now on model.compile makes graphs as it would for CUDA, with a stand-in for its kernel, and doesn't compile
    them, which for the processor takes long and tells nothing of a GPU."""
    from torch import nn

    from kernel import varlen_attn
    from sft.model import varlen

    varlen.varlen_attn, varlen.takes = varlen_attn, lambda *_: True
    original = nn.Module.compile
    nn.Module.compile = lambda self, **options: original(self, backend="eager", **options)  # type: ignore[method-assign]


def context() -> Any:
    """How a check starts processes of its own."""
    return multiprocessing.get_context(os.environ.get("SFT_CHECKS_START", "fork"))


@dataclass(frozen=True)
class Place:
    """Where a check runs, and how large."""

    gpu: bool
    folder: Path  # to work in; shared by all checks

    @property
    def device(self) -> str:
        return "cuda" if self.gpu else "cpu"


@dataclass(frozen=True)
class Check:
    """`function`, as MODULE:NAME, is called with a `Place` and `arguments`, and returns a line and figures."""

    name: str
    what: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 60  # that it may take on a GPU
    needs: tuple[str, ...] = ()  # packages
    cuda: bool = False  # needs a GPU whatever its size
    alone: bool = False  # measures time, so nothing runs beside it


@dataclass(frozen=True)
class Result:
    check: Check
    state: str  # passed, failed, not run
    line: str
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)

    def text(self) -> str:
        state = "FAILED" if self.state == "failed" else self.state
        took = f"{self.seconds:6.1f} s" if self.state != "not run" else " " * 8
        lines = [f"{state:<8} {self.check.name:<28} {took}  {self.line}"]
        return "\n".join([*lines, *(f"         | {line}" for line in self.tail[-SHOWN:])])

    def document(self) -> dict[str, Any]:
        document = {"state": self.state, "line": self.line, "seconds": round(self.seconds, 1), "figures": self.figures}
        return document | ({"tail": self.tail} if self.tail else {})


def run(
    checks: list[Check], place: Place, jobs: int, seconds: float, limit: float = 600
) -> Generator[Result, None, None]:
    """The result of each check as it ends; they begin in their order, `jobs` at a time, and end within `seconds`.

    `limit`: seconds that one may take on a processor.
    """
    deadline = time.monotonic() + seconds
    server: Any = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*PRELOADED, *([] if place.gpu else PRELOADED_CPU)])
    # Nothing is worth measuring on the processor.
    waiting = [check if place.gpu else replace(check, alone=False) for check in checks]
    running: dict[Connection, Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs and not any(each.check.alone for each in running.values()):
                check = waiting[0]
                if check.alone and running:
                    break
                waiting.pop(0)
                left = deadline - time.monotonic()
                if reason := why_not(check, place) or ("no time is left" if left < LEAST else None):
                    yield Result(check, "not run", reason)
                else:
                    started = Running(check, place, min(left, check.seconds if place.gpu else limit), server)
                    running[started.pipe] = started
            if not running:
                continue
            soonest = min(each.deadline for each in running.values())
            ready = wait(list(running), max(0.0, soonest - time.monotonic()))
            late = [pipe for pipe, each in running.items() if each.deadline <= time.monotonic() and pipe not in ready]
            for pipe in [*ready, *late]:
                result = running.pop(pipe).end()  # type: ignore[call-overload]
                if "in forked" in result.line:  # torch's words for it
                    os.environ["SFT_CHECKS_START"] = "spawn"
                    server = multiprocessing.get_context("spawn")
                    waiting.insert(0, result.check)
                else:
                    yield result
    finally:
        for each in running.values():  # where it is stopped
            each.end()


def why_not(check: Check, place: Place) -> str | None:
    """What keeps a check from being made here."""
    if check.cuda and not place.gpu:
        return "needs a GPU"
    missing = [package for package in check.needs if find_spec(package) is None]
    return f"{', '.join(missing)} not installed" if missing else None


class Running:
    """A check under way."""

    def __init__(self, check: Check, place: Place, seconds: float, server: Any) -> None:
        self.check, self.started, self.limit = check, time.monotonic(), seconds
        self.deadline = self.started + seconds
        self.log = place.folder / "logs" / f"{check.name}.log"
        self.log.parent.mkdir(exist_ok=True)
        self.pipe, there = server.Pipe(duplex=False)
        self.process = server.Process(target=_work, args=(check, place, str(self.log), there))
        self.process.start()
        there.close()

    def end(self) -> Result:
        """Its result; one that hasn't ended is ended now, with all that it has started."""
        state, line, figures = "failed", f"did not end within {self.limit:.0f} s", {}
        if self.pipe.poll():
            try:
                state, line, figures = json.loads(self.pipe.recv())
            except EOFError:
                self.process.join()
                line = f"its process ended with {_ending(self.process.exitcode)}"
        self.process.kill()  # it may have no group of its own yet
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        tail = self.log.read_text(errors="replace").strip().splitlines()[-KEPT:] if state == "failed" else []
        return Result(self.check, state, line, time.monotonic() - self.started, figures, tail)


def _ending(code: int | None) -> str:
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def _work(check: Check, place: Place, log: str, pipe: Connection) -> None:
    os.setsid()
    divert(log)
    # Before the first product: what deterministic ones need.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    module, _, name = check.function.partition(":")
    try:
        line, figures = getattr(import_module(module), name)(place, **check.arguments)
        answer: tuple[str, str, dict[str, Any]] = "passed", line, figures
    except NotRun as reason:
        answer = "not run", str(reason), {}
    except Failed as fault:
        answer = "failed", str(fault), {}
    except ModuleNotFoundError as error:
        own = (error.name or "").partition(".")[0] in OWN
        traceback.print_exc()
        answer = ("failed", str(error), {}) if own else ("not run", f"{error.name} not installed", {})
    except Exception as error:
        traceback.print_exc()
        answer = "failed", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", {}
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send(json.dumps(answer))
    os._exit(0)


def divert(log: str) -> None:
    """What this process prints goes to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


class Sft:
    """Runs of `sft`, or of the main() of a module of its, in a folder, each in a process that is forked from this one,
    which must not have touched CUDA."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)

    def start(self, name: str, *arguments: str, **environment: str) -> "Started":
        return Started(self.folder, name, arguments, environment)

    def __call__(self, name: str, *arguments: str, code: int = 0) -> str:
        """What `sft ARGUMENTS` printed; `Failed` where it ends otherwise than with `code`."""
        return self.start(name, *arguments).end(code)


class Started:
    def __init__(self, folder: Path, name: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
        self.log = folder / f"{name}.log"
        self.process = context().Process(target=_sft, args=(str(folder), str(self.log), arguments, environment))
        self.process.start()

    def end(self, code: int = 0) -> str:
        self.process.join()
        printed = self.log.read_text(errors="replace")
        if self.process.exitcode != code:
            print(f"{self.log.name}:\n{printed}", flush=True)
            said = next((line for line in reversed(printed.strip().splitlines()) if line.strip()), "")
            ending = _ending(self.process.exitcode)
            raise Failed(f"{self.log.stem} ended with {ending} instead of {_ending(code)}: {said[:200]}")
        return printed


def _sft(folder: str, log: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    os.chdir(folder)
    os.environ |= environment | {"WANDB_MODE": "offline"}
    rank_zero_only.rank = int(environment.get("RANK", "0"))  # type: ignore[attr-defined]  # known before the fork
    divert(log)
    module, *rest = arguments if arguments[0].startswith("sft.") else ("sft.cli", *arguments)
    sys.argv = ["sft", *rest]
    main: Callable[[], None] = import_module(module).main
    main()
