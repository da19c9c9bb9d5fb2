"""Under which conditions something was measured, and how results are shown."""

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "lightning", "transformers", "deepspeed", "peft", "bitsandbytes", "trl", "accelerate", "datasets")
PACKAGES += ("tokenizers", "numpy", "triton", "nvidia-nccl-cu13", "nvidia-nccl-cu12")


def gather() -> dict[str, Any]:
    return {
        "gpu": _gpu(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: installed for name in PACKAGES if (installed := _version(name))},
        "commit": _git("rev-parse", "--short", "HEAD") + (" + changes" if _git("status", "--porcelain") else ""),
    }


def show(conditions: dict[str, Any]) -> None:
    print("\n".join(lines(conditions)), flush=True)


def lines(conditions: dict[str, Any]) -> list[str]:
    """As text, a line each."""
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    one, five, fifteen = conditions["load_average"]
    gpus = [f"gpu     {each['name']}, {each['memory']}, driver {each['driver']}" for each in conditions["gpu"]]
    return [
        *gpus,
        f"cpu     {conditions['cpu']}, {conditions['cores']} cores, {conditions['memory_gb']} GB",
        f"load    {one} {five} {fifteen} (1, 5, 15 minutes)",
        f"python  {conditions['python']}, {versions}",
        f"commit  {conditions['commit'] or 'not a checkout'}",
    ]


def peak_rss() -> int:
    """Bytes of this process's largest resident set.

    Linux hands a parent's own peak on to its children: start what is measured from a small process.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss() -> tuple[int, int]:
    """Bytes of this process's resident set now, and of it those that no file backs (Linux)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, private = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon"))
    return resident, private


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints columns, the first one aligned left and the others right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        print("  " + "   ".join([first.strip().ljust(widths[0]), *others]))
    sys.stdout.flush()


def _gpu() -> list[dict[str, str]]:
    """Each GPU as nvidia-smi names it; none where there is no nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in told.strip().splitlines()]
    return [dict(zip(("name", "memory", "driver"), row, strict=True)) for row in rows]


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    """What git says of the folder that this file lies in; nothing outside a checkout."""
    try:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
