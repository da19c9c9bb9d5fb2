"""`bench start`: what comparing checksums costs when a run resumes: the time from the command to the first step, and of
that the time to read the checkpoint and the token store for their checksums alone, in a process of its own."""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from benchmarks.conditions import table
from benchmarks.tracking import OFF, command, environment, prepare, started
from sft.data import store
from sft.runs import events, saved

LEFT = ("checkpoint.save_every=1", "checkpoint.keep_last=9")


def measure(options: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        prepare(folder, options)
        run = folder / "runs" / "run"
        train = command(folder, options, (*OFF, *LEFT))
        started(train, options)
        newest = [*saved.folders(run / "checkpoints").values()][-1]
        shutil.rmtree(newest)  # its last step is left to do
        (run / "status.json").unlink()
        (kept,) = list((folder / "cache" / "stores").iterdir())
        sizes = {"checkpoint": _size([*saved.folders(run / "checkpoints").values()][-1]), "store": _size(kept)}
        rounds = []
        for repeat in range(options.repeats):
            seconds = until_it_starts(train, run, options)
            compared = float(
                subprocess.check_output([sys.executable, __file__, str(run), str(kept)], env=environment(options))
            )
            rounds.append({"start": seconds, "compare": compared, "share": compared / seconds})
            load = os.getloadavg()[0]
            print(
                f"  {repeat + 1} {seconds:6.2f} s to the start, checksums {compared:.3f} s   load {load:.1f}",
                flush=True,
            )
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    header = ["", "MB compared", "start, s", "checksums, s", "share"]
    row = ["median", f"{sum(sizes.values()) / 1e6:,.0f}", f"{median['start']:.2f}", f"{median['compare']:.3f}"]
    table("the start of a run that resumes", header, [[*row, f"{median['share']:.1%}"]])
    return {"sizes": sizes, "rounds": rounds, "median": median}


def until_it_starts(train: list[str], run: Path, options: Namespace) -> float:
    """Seconds from the command until its ranks begin with the steps, in which it is killed."""
    before = len(_starts(run))
    began = time.perf_counter()
    with subprocess.Popen(
        train, env=environment(options), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        while len(_starts(run)) == before:
            if process.poll() is not None:
                assert process.stderr is not None
                sys.exit(f"the run did not start: {process.stderr.read().decode()[-2000:]}")
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGKILL)
    return seconds


def _starts(run: Path) -> list[Any]:
    return [event for event in events.read(run) if event["event"] == "start"]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def compare(run: Path, kept: Path) -> float:
    """Seconds to read all that a start compares."""
    began = time.perf_counter()
    newest, _ = saved.whole(run / "checkpoints")
    assert newest and not saved.faults(newest)
    store.check(kept, contents=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    print(compare(*map(Path, sys.argv[1:])))
