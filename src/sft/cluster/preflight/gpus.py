"""Health of a node's GPUs, as nvidia-smi reports it."""

import shutil
import subprocess
from typing import TypedDict

# nvidia-smi's names, and the fault if the value is "Active", "Yes" or a number other than 0.
HEALTH = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors",
    "retired_pages.pending": "a memory page waits to be retired, which a reset does",
    "remapped_rows.pending": "a memory row waits to be remapped, which a reset does",
    "remapped_rows.failure": "a memory row can't be remapped",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowed down by heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowed down by its power supply",
}
QUERY = ("index", "driver_version", "temperature.gpu", *HEALTH)


class Gpu(TypedDict):
    index: int
    driver: str
    celsius: float | None
    faults: list[str]


def health() -> list[Gpu]:
    """The node's GPUs; none if there is no nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if answer.returncode:
        raise RuntimeError(f"nvidia-smi ended with exit code {answer.returncode}: {answer.stdout.strip()[:200]}")
    return parse(answer.stdout)


def parse(csv: str) -> list[Gpu]:
    """nvidia-smi's answer to `QUERY`. A value that a model doesn't report ("[N/A]", "[Not Supported]") is no fault."""
    gpus: list[Gpu] = []
    for line in csv.strip().splitlines():
        index, driver, celsius, *values = (value.strip() for value in line.split(","))
        faults = [
            f"{fault} ({value})"
            for value, fault in zip(values, HEALTH.values(), strict=True)
            if value in ("Active", "Yes") or (value.isdigit() and int(value))
        ]
        temperature = float(celsius) if celsius.isdigit() else None
        gpus.append({"index": int(index), "driver": driver, "celsius": temperature, "faults": faults})
    return gpus
