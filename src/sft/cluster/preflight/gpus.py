"""Health of a node's GPUs, as nvidia-smi tells it."""

import shutil
import subprocess
from typing import Any

# What may be asked for, and what is wrong where the answer is "Active", "Yes" or a number other than 0.
HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
    "retired_pages.pending": "a memory page waits to be retired, which a reset does",
    "remapped_rows.pending": "a memory row waits to be remapped, which a reset does",
    "remapped_rows.failure": "a memory row can't be remapped",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by its power supply",
}
QUERY = ("index", "driver_version", "temperature.gpu", *HEALTH)


def health() -> list[dict[str, Any]]:
    """Of each GPU its index, driver, temperature and faults; nothing where there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi ended with exit code {done.returncode}: {done.stdout.strip()[:200]}")
    return parse(done.stdout)


def parse(csv: str) -> list[dict[str, Any]]:
    """nvidia-smi's answer to `QUERY`. What a model doesn't report ("[N/A]", "[Not Supported]") is no fault."""
    gpus = []
    for line in csv.strip().splitlines():
        index, driver, celsius, *values = (value.strip() for value in line.split(","))
        faults = [
            f"{fault} ({value})"
            for value, fault in zip(values, HEALTH.values(), strict=True)
            if value in ("Active", "Yes") or (value.isdigit() and int(value))
        ]
        gpus.append(
            {
                "index": int(index),
                "driver": driver,
                "celsius": float(celsius) if celsius.isdigit() else None,
                "faults": faults,
            }
        )
    return gpus
