"""What sbatch will allocate to slurm/train.sbatch: by the script's `#SBATCH` lines, over them the SBATCH_* variables
that slurm/site.sh exports, over those the options that are given."""

import argparse
import re
import shlex
import signal
import subprocess
from argparse import Namespace
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

# Of sbatch's options those that decide what the job gets; all others go to sbatch unread.
OPTIONS = (
    ("-N", "--nodes"),
    ("-n", "--ntasks"),
    ("--ntasks-per-node",),
    ("-c", "--cpus-per-task"),
    ("-G", "--gpus"),
    ("--gpus-per-node",),
    ("--gpus-per-task",),
    ("--gres",),
    ("-t", "--time"),
    ("--signal",),
    ("-p", "--partition"),
    ("-A", "--account"),
    ("-q", "--qos"),
    ("-J", "--job-name"),
    ("-o", "--output"),
    ("-D", "--chdir"),
    ("-a", "--array"),
    ("--wrap",),
)
VARIABLES = {
    "GPUS": "gpus",
    "GPUS_PER_NODE": "gpus_per_node",
    "GPUS_PER_TASK": "gpus_per_task",
    "GRES": "gres",
    "TIMELIMIT": "time",
    "SIGNAL": "signal",
    "PARTITION": "partition",
    "ACCOUNT": "account",
    "QOS": "qos",
    "JOB_NAME": "job_name",
    "OUTPUT": "output",
    "ARRAY_INX": "array",
}
REFUSED = {
    "array": "a job trains one run; for many, sbatch --array with slurm/sweep.sbatch",
    "wrap": f"the job is {SCRIPT}: give the settings of sft train after --",
}
DEFAULT_LEAD = 60  # seconds, where --signal names none


@dataclass(frozen=True)
class Job:
    """A request to sbatch. Times in seconds."""

    options: list[str]  # as given
    settings: list[str]  # of sft train, as given
    environment: dict[str, str]  # the SBATCH_* variables
    nodes: int
    tasks: int  # a node; each is a rank
    gpus: int  # a node
    cpus: int  # a task
    limit: float | None  # None: the partition's default
    lead: int  # of the signal before the limit
    partitions: list[str]  # empty: the default
    account: str | None
    qos: str | None
    name: str | None  # None: not given
    output: str | None  # None: not given

    @property
    def overrides(self) -> list[str]:
        """The settings that the ranks get: train.sbatch puts the allocation's own numbers behind those given."""
        return [*self.settings, f"trainer.num_nodes={self.nodes}", f"trainer.devices={self.tasks}"]

    @classmethod
    def of(cls, arguments: Sequence[str], project: Path = PROJECT) -> "Job":
        """The job of `[sbatch options] -- [settings]`; `UserError` where the options don't say what ranks there are,
        or leave them no time to save."""
        options, settings = split(arguments)
        if not (project / SCRIPT).is_file():
            raise UserError(f"there is no {SCRIPT} in {project}: sft submit needs the project's own folder")
        environment = site_environment(project)
        given = parse(options, Namespace(**_from_environment(environment)))
        for name, why in REFUSED.items():
            if getattr(given, name, None):
                raise UserError(f"--{name} is not for sft submit: {why}")
        if (chdir := getattr(given, "chdir", None)) and Path(chdir).resolve() != project:
            raise UserError(f"--chdir={chdir}: the job runs in the project's folder, {project}: leave it away")
        asked = Namespace(**{**vars(parse(directives((project / SCRIPT).read_text()))), **vars(given)})
        nodes, tasks = _ranks(asked)
        limit, lead = _times(asked)
        partition = getattr(asked, "partition", None)
        return cls(
            options,
            settings,
            environment,
            nodes,
            tasks,
            _gpus(asked, nodes, tasks),
            _number(asked, "cpus_per_task") or 1,
            limit,
            lead,
            partition.split(",") if partition else [],
            getattr(asked, "account", None),
            getattr(asked, "qos", None),
            getattr(given, "job_name", None),
            getattr(given, "output", None),
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
    # Hydra's parser takes overrides in one piece only, and the job puts its own behind them.
    first = next(
        (place for place, each in enumerate(settings) if "=" in each and not each.startswith("-")), len(settings)
    )
    if flags := [each for each in settings[first:] if each.startswith("-")]:
        raise UserError(f"{flags[0]} goes before the settings: sft submit ... -- {flags[0]} ... experiment=gsm8k")
    return options, settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"of the options of sbatch, {message}: see sbatch --help")


def parse(options: Sequence[str], below: Namespace | None = None) -> Namespace:
    """What `options` say, over what `below` says; what nobody says is no attribute."""
    parser = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for names in OPTIONS:
        parser.add_argument(*names)
    known, _ = parser.parse_known_args(options, below)
    return known


def directives(script: str) -> list[str]:
    """The options of a script's `#SBATCH` lines, which end where its commands begin."""
    options: list[str] = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            options += shlex.split(line.removeprefix("#SBATCH"), comments=True)
        elif line.strip() and not line.startswith("#"):
            break
    return options


@cache
def site_environment(project: Path) -> dict[str, str]:
    """The SBATCH_* variables once site.sh is sourced, as the job will source it."""
    asked = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f"source {SITE} >/dev/null; env -0"],
        cwd=project,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if asked.returncode:
        told = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        raise UserError(f"{SITE} fails, as it would in the job: {told}")
    pairs = (variable.partition("=") for variable in asked.stdout.split("\0"))
    return {name: value for name, _, value in pairs if name.startswith("SBATCH_")}


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = ((f"SBATCH_{variable}", name) for variable, name in VARIABLES.items())
    return {name: environment[variable] for variable, name in names if variable in environment}


def _number(asked: Namespace, name: str, least: int = 1) -> int | None:
    value = getattr(asked, name, None)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"--{name.replace('_', '-')}={value} is not a whole number from {least} on")
    return int(value)


def _ranks(asked: Namespace) -> tuple[int, int]:
    """Nodes, and tasks a node."""
    nodes, tasks, total = (_number(asked, name) for name in ("nodes", "ntasks_per_node", "ntasks"))
    if nodes is None or (tasks is None and total is None):
        raise UserError(f"the job's size is open: set --nodes and --ntasks-per-node, here or in {SCRIPT}")
    if tasks is None:
        assert total is not None
        if total % nodes:
            raise UserError(f"--ntasks={total} can't be shared by {nodes} nodes: set --ntasks-per-node")
        tasks = total // nodes
    elif total not in (None, nodes * tasks):
        raise UserError(f"--ntasks={total} is not {nodes} nodes × {tasks} tasks: set --nodes and --ntasks-per-node")
    return nodes, tasks


def _gpus(asked: Namespace, nodes: int, tasks: int) -> int:
    """GPUs a node, from whatever options say it."""
    if value := getattr(asked, "gpus_per_task", None):
        raise UserError(
            f"--gpus-per-task={value} shows each rank its own GPU alone, while a rank is given one by its place on the "
            f"node, and NVLink needs its neighbours': set --gpus-per-node={count_gpus(value) * tasks}"
        )
    said: dict[str, float] = {}
    for name, factor in (("gpus_per_node", 1), ("gpus", 1 / nodes)):
        if value := getattr(asked, name, None):
            said[f"--{name.replace('_', '-')}={value}"] = count_gpus(value) * factor
    if gres := [each for each in getattr(asked, "gres", "").split(",") if each.split(":")[0] == "gpu"]:
        said[f"--gres={asked.gres}"] = sum(count_gpus(each.partition(":")[2] or "1") for each in gres)
    if len(set(said.values())) > 1:
        told = ", ".join(f"{option} ({count:g})" for option, count in said.items())
        raise UserError(f"GPUs a node are said in different ways, {told}: set --gpus-per-node alone")
    count = next(iter(said.values()), 0)
    if count != int(count):
        raise UserError(f"{next(iter(said))} can't be shared by {nodes} nodes: set --gpus-per-node")
    return int(count)


def count_gpus(value: str) -> int:
    """Number of GPUs of `8`, `a100:8` or `a100:4,v100:4`."""
    numbers = [each.rpartition(":")[2] for each in value.split(",")]
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{value} is no number of GPUs: set --gpus-per-node=8, or --gpus-per-node=TYPE:8")
    return sum(map(int, numbers))


def _times(asked: Namespace) -> tuple[float | None, int]:
    """Time limit and the signal's lead, in seconds."""
    time, sent = getattr(asked, "time", None), getattr(asked, "signal", None)
    limit = duration(time) if time else None
    found = re.fullmatch(r"(?:([RB]+):)?(\w+)(?:@(\d+))?", sent or "")
    names = {name for each in SIGNALS for name in (each.name, each.name.removeprefix("SIG"), str(each.value))}
    if not found or found[2].upper() not in names:
        known = " or ".join(signal.Signals(each).name.removeprefix("SIG") for each in SIGNALS)
        raise UserError(f"--signal={sent or ''} is no signal that the ranks save on ({known}): set --signal=USR1@300")
    if "B" in (found[1] or ""):
        raise UserError(f"--signal={sent} goes to the batch script alone, and it is the ranks that save: leave B: away")
    return limit, int(found[3] or DEFAULT_LEAD)
