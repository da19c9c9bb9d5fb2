"""Finds the bad nodes of an allocation before a long job does. Run by slurm/preflight.sbatch:

  python -m sft.cluster.preflight check FOLDER     on every rank: measures, and writes FOLDER/rank-N.json
  python -m sft.cluster.preflight report FOLDER    afterwards, once: judges these files and names the bad nodes

A rank may hang or die with its node. Its check has a time limit, and its file says which stage it reached, so the
report names the node that all others waited for.
"""

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from sft.cluster.preflight.judge import DONE, Judgement, Limits, Report, judge
from sft.runs.process import leave

# The measurements in the table: header, name in the report, format, unit.
COLUMNS = (
    ("runs", "runs_gb", ".3g", "GB"),
    ("/tmp", "tmp_gb", ".3g", "GB"),
    ("/dev/shm", "shm_gb", ".3g", "GB"),
    ("write", "write_mb_s", ".0f", "MB/s"),
    ("clock", "clock_s", "+.3f", "s"),
    ("between its GPUs", "inside_gb_s", ".3g", "GB/s"),
)


def main() -> None:
    arguments = parse()
    if arguments.verb == "report":
        sys.exit(report(arguments))
    check(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__)
    parser.add_argument("verb", choices=["check", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write-mb", type=int, default=256, help="that each node writes to the shared folder")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for all checks of a rank")
    parser.add_argument("--limit", type=limit, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--nodes", nargs="+", default=[])
    parser.add_argument("--lost", nargs="*", default=[])
    parser.add_argument("--ranks-per-node", type=int, default=1)
    return parser.parse_args()


def limit(text: str) -> tuple[str, float]:
    """NAME=VALUE"""
    name, _, value = text.partition("=")
    names = sorted(field.name for field in fields(Limits))
    if name not in names:
        raise argparse.ArgumentTypeError(f"there is no limit {name}: there are {', '.join(names)}")
    return name, float(value)


def check(arguments: argparse.Namespace) -> None:
    from sft.cluster.preflight.measure import Rank

    signal.alarm(arguments.timeout)  # ends the process, wherever it hangs
    if "SLURM_PROCID" not in os.environ:
        sys.exit("preflight: srun starts this on the nodes of an allocation: see slurm/preflight.sbatch")
    try:
        rank = Rank(arguments.folder)
    except OSError as error:
        sys.exit(f"{os.environ['SLURMD_NODENAME']}: {arguments.folder} can't be written here: {error.strerror}")
    try:
        rank.check(arguments.write_mb, arguments.timeout / 3)
    except Exception as error:
        with suppress(OSError):  # a full disk may be the very failure
            rank.note(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{rank.node}: {rank.stage}: {error}", file=sys.stderr, flush=True)
    leave(rank.stage != DONE)


def report(arguments: argparse.Namespace) -> int:
    """Prints the judgement; 1 if something is wrong."""
    for path in arguments.folder.glob("written-*"):  # by ranks that were killed while they wrote
        path.unlink()
    reports = [json.loads(path.read_text()) for path in sorted(arguments.folder.glob("rank-*.json"))]
    limits = Limits(**dict(arguments.limit))
    judgement = judge(reports, arguments.nodes, arguments.ranks_per_node, limits, arguments.lost)
    show(judgement, {report["node"]: report for report in reports if report["local_rank"] == 0})
    return 1 if judgement.bad or judgement.troubles else 0


def show(judgement: Judgement, leaders: dict[str, Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    table = Table("node", "GPUs", *(header for header, *_ in COLUMNS), "verdict")
    for node, faults in judgement.faults.items():
        leader = leaders.get(node, {})
        cells = [str(leader["gpus"]["visible"]) if "gpus" in leader else ""]
        for _, name, form, unit in COLUMNS:
            value = leader.get(name)
            cells.append(f"{value:{form}} {unit}" if value is not None else "")
        table.add_row(node, *cells, "\n".join(faults) or "ok")
    console.print(table)
    for leader in leaders.values():
        if leader["rank"] == 0 and "all_gb_s" in leader:
            size = f"all-reduce of {leader['all_mb']} MB over {leader['num_ranks']} ranks"
            print(f"{size}: {leader['all_gb_s']:.3g} GB/s (bus bandwidth)")
    for line in [*judgement.troubles, *judgement.notes]:
        print(line)
    print(judgement.line())


if __name__ == "__main__":
    main()
