"""What sbatch will allocate to slurm/train.sbatch. Options on the command line go before the SBATCH_* variables that
slurm/site.sh exports, and those before the script's `#SBATCH` lines."""

import argparse
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NoReturn

from sft.cluster.time_limit import duration
from sft.errors import UserError
from sft.runs.signals import SIGNALS

PROJECT = Path(__file__).resolve().parents[3]
SCRIPT = "slurm/train.sbatch"
SITE = "slurm/site.sh"

# The options that decide what the job gets: name, short form, SBATCH_* variable. sbatch gets all others unread.
OPTIONS = (
    ("nodes", "-N", None),
    ("ntasks", "-n", None),
    ("ntasks_per_node", None, None),
    ("cpus_per_task", "-c", None),
    ("gpus_per_node", None, "SBATCH_GPUS_PER_NODE"),
    ("gres", None, "SBATCH_GRES"),
    ("time", "-t", "SBATCH_TIMELIMIT"),
    ("signal", None, "SBATCH_SIGNAL"),
    ("partition", "-p", "SBATCH_PARTITION"),
    ("qos", "-q", "SBATCH_QOS"),
    ("output", "-o", "SBATCH_OUTPUT"),
    ("chdir", "-D", None),
    ("gpus", "-G", "SBATCH_GPUS"),
    ("gpus_per_task", None, "SBATCH_GPUS_PER_TASK"),
    ("array", "-a", "SBATCH_ARRAY_INX"),
    ("wrap", None, None),
)
_PER_NODE = "each rank drives one of the GPUs of its node and must see the others: set --gpus-per-node"
REFUSED = {
    "gpus": _PER_NODE,
    "gpus_per_task": _PER_NODE,
    "array": "a job trains one run; for many, sbatch --array with slurm/sweep.sbatch",
    "wrap": f"the job is {SCRIPT}: give the settings of sft train after --",
}
DEFAULT_SIGNAL_SECONDS = 60  # before the end, where --signal names none


@dataclass(frozen=True)
class Job:
    """A request to sbatch. Times in seconds."""

    options: list[str]  # as given
    settings: list[str]  # of sft train, as given
    environment: dict[str, str]  # the SBATCH_* variables
    nodes: int
    tasks: int  # per node; each is a rank
    gpus: int  # per node
    cpus: int  # per task
    limit: float | None  # None: the partition's default
    signal_seconds_before_end: int
    partitions: list[str]  # empty: the default
    qos: str | None
    output: str | None  # None: not given

    @property
    def overrides(self) -> list[str]:
        """The settings of the ranks: train.sbatch appends the allocation's nodes and tasks to those given."""
        return [*self.settings, f"trainer.num_nodes={self.nodes}", f"trainer.devices={self.tasks}"]

    @classmethod
    def of(cls, arguments: Sequence[str], project: Path = PROJECT) -> "Job":
        """The job of `[sbatch options] -- [settings]`; `UserError` if the options don't say how many ranks and GPUs a
        node has, or give the ranks no signal to save on."""
        options, settings = split(arguments)
        if not (project / SCRIPT).is_file():
            raise UserError(f"there is no {SCRIPT} in {project}: sft submit needs the project's own folder")
        environment = site_environment(project)
        exported = {name: environment[variable] for name, _, variable in OPTIONS if variable in environment}
        given = exported | parse(options)
        values = parse(directives((project / SCRIPT).read_text())) | given
        for name, why in REFUSED.items():
            if name in values:
                raise UserError(f"{_option(name)} is not for sft submit: {why}")
        chdir = values.get("chdir")
        if chdir and Path(chdir).resolve() != project:
            raise UserError(f"--chdir={chdir}: the job runs in the project's folder, {project}: leave it out")
        nodes, tasks = _ranks(values)
        return cls(
            options=options,
            settings=settings,
            environment=environment,
            nodes=nodes,
            tasks=tasks,
            gpus=_gpus(values),
            cpus=_number(values, "cpus_per_task") or 1,
            limit=duration(values["time"]) if "time" in values else None,
            signal_seconds_before_end=_signal_seconds_before_end(values.get("signal", "")),
            partitions=values["partition"].split(",") if "partition" in values else [],
            qos=values.get("qos"),
            output=given.get("output"),
        )


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of sbatch, settings of sft train."""
    if "--" not in arguments:
        raise UserError(
            "there is no -- between the options of sbatch and the settings of sft train: "
            "sft submit --nodes=2 -- experiment=gsm8k"
        )
    at = list(arguments).index("--")
    options, settings = list(arguments[:at]), list(arguments[at + 1 :])
    if {"-m", "--multirun"} & set(settings):
        raise UserError("-m is not for sft submit: a job trains one run; sweeps: sft train -m hydra/launcher=slurm")
    # Hydra's parser takes all overrides in one piece, and the job appends its own.
    after_override = False
    for setting in settings:
        if setting.startswith("-") and after_override:
            raise UserError(f"{setting} goes before the settings: sft submit ... -- {setting} ... experiment=gsm8k")
        after_override |= "=" in setting and not setting.startswith("-")
    return options, settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"options of sbatch: {message}: see sbatch --help")


def parse(options: Sequence[str]) -> dict[str, str]:
    """The values of those `OPTIONS` that are given, by name."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name, short, _ in OPTIONS:
        parser.add_argument(*([short] if short else []), _option(name))
    return vars(parser.parse_known_args(options)[0])


def directives(script: str) -> list[str]:
    """The options in a script's `#SBATCH` lines, as far as its first command."""
    options: list[str] = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            options += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    return options


@cache
def site_environment(project: Path) -> dict[str, str]:
    """The SBATCH_* variables after site.sh is sourced, as the job will source it."""
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {SITE} >/dev/null; env -0"],
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if shell.returncode:
        lines = shell.stderr.strip().splitlines() or [f"exit code {shell.returncode}"]
        raise UserError(f"{SITE} fails, as it would in the job: {lines[-1]}")
    pairs = (variable.partition("=") for variable in shell.stdout.split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_")}


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(values: Mapping[str, str], name: str) -> int | None:
    value = values.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"{_option(name)}={value} is not a whole number from 1 on")
    return int(value)


def _ranks(values: Mapping[str, str]) -> tuple[int, int]:
    """Nodes, and tasks per node."""
    nodes, tasks, total = (_number(values, name) for name in ("nodes", "ntasks_per_node", "ntasks"))
    if nodes is None or tasks is None:
        raise UserError(
            f"the options leave open how many ranks there are: set --nodes and --ntasks-per-node, here or in {SCRIPT}"
        )
    if total not in (None, nodes * tasks):
        raise UserError(f"--ntasks={total} is not {nodes} nodes × {tasks} tasks: set --nodes and --ntasks-per-node")
    return nodes, tasks


def _gpus(values: Mapping[str, str]) -> int:
    """GPUs per node, of `--gpus-per-node` or `--gres=gpu:N`."""
    gres = [item for item in values.get("gres", "").split(",") if item.split(":")[0] == "gpu"]
    counts = [count_gpus(value) for value in (values.get("gpus_per_node"), ",".join(gres)) if value]
    if len(set(counts)) > 1:
        raise UserError(
            f"--gpus-per-node={values['gpus_per_node']} and --gres={values['gres']} differ: set --gpus-per-node alone"
        )
    return counts[0] if counts else 0


def count_gpus(value: str) -> int:
    """Number of GPUs of `8`, `a100:8`, `gpu:a100:8` or `a100:4,v100:4`."""
    numbers = [kind.rpartition(":")[2] for kind in value.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{value} is no number of GPUs: set --gpus-per-node=8, or --gpus-per-node=TYPE:8")
    return sum(map(int, numbers))


def _signal_seconds_before_end(value: str) -> int:
    match = re.fullmatch(r"(?:([RB]+):)?(\w+)(?:@(\d+))?", value)
    names = {name for known in SIGNALS for name in (known.name, known.name.removeprefix("SIG"), str(known.value))}
    if not match or match[2].upper() not in names:
        raise UserError(f"--signal={value} is no signal that the ranks save on (USR1 or TERM): set --signal=USR1@300")
    if "B" in (match[1] or ""):
        raise UserError(f"--signal={value} goes to the batch script alone, but the ranks save: leave out B:")
    return int(match[3] or DEFAULT_SIGNAL_SECONDS)
