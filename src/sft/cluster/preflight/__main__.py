"""Tells the bad nodes of an allocation before a long job finds them. Run by slurm/preflight.sbatch:

  python -m sft.cluster.preflight check FOLDER     on every rank: measures, and leaves FOLDER/rank-N.json
  python -m sft.cluster.preflight report FOLDER    afterwards, once: judges these, and names the nodes

The ranks' part may hang or die where a node does. It has a time limit, and what it came to is in its file, so that the
report names the node that all others waited for.
"""

import argparse
import json
import os
import signal
import sys
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sft.cluster.preflight.judge import DONE, Limits, Verdict, judge


def main() -> None:
    arguments = parse()
    if arguments.verb == "report":
        sys.exit(report(arguments))
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
        with suppress(OSError):  # such as a full disk, which may be what is told
            rank.note(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        print(f"{rank.node}: {rank.stage}: {error}", file=sys.stderr, flush=True)
    os._exit(rank.stage != DONE)  # threads of a process group can crash or hang an interpreter's own end


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="preflight", description=__doc__)
    parser.add_argument("verb", choices=["check", "report"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--write-mb", type=int, default=256, help="that each node writes to the shared folder")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for all of a rank's checks")
    parser.add_argument("--limit", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--nodes", nargs="+", default=[])
    parser.add_argument("--lost", nargs="*", default=[])
    parser.add_argument("--ranks-a-node", type=int, default=1)
    arguments = parser.parse_args()
    known = {each.name for each in fields(Limits)}
    try:
        limits = {name: float(value) for name, _, value in (each.partition("=") for each in arguments.limit)}
    except ValueError:
        parser.error(f"--limit {' '.join(arguments.limit)}: give NAME=NUMBER")
    if unknown := limits.keys() - known:
        parser.error(f"there is no limit {min(unknown)}: there are {', '.join(sorted(known))}")
    arguments.limits = replace(Limits(), **limits)
    return arguments


def report(arguments: argparse.Namespace) -> int:
    """Prints the verdict; 1 where something is wrong."""
    for path in arguments.folder.glob("written-*"):  # by ranks that were killed while they wrote
        path.unlink()
    reports = [json.loads(path.read_text()) for path in sorted(arguments.folder.glob("rank-*.json"))]
    verdict = judge(reports, arguments.nodes, arguments.ranks_a_node, arguments.limits, arguments.lost)
    show(verdict, {each["node"]: each for each in reports if each["local_rank"] == 0})
    return 1 if verdict.bad or verdict.troubles else 0


def show(verdict: Verdict, leaders: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)
    table = Table("node", "GPUs", "runs", "/tmp", "/dev/shm", "write", "clock", "between its GPUs", "verdict")
    for node, faults in verdict.faults.items():
        known = leaders.get(node, {})
        cells = [
            str(known["gpus"]["visible"]) if "gpus" in known else "",
            *(
                f"{known[name]:{form}} {unit}" if known.get(name) is not None else ""
                for name, form, unit in (
                    ("runs_gb", ".3g", "GB"),
                    ("tmp_gb", ".3g", "GB"),
                    ("shm_gb", ".3g", "GB"),
                    ("write_mb_s", ".0f", "MB/s"),
                    ("clock_s", "+.3f", "s"),
                    ("inside_gb_s", ".3g", "GB/s"),
                )
            ),
        ]
        table.add_row(node, *cells, "\n".join(faults) or "ok")
    console.print(table)
    for leader in leaders.values():
        if leader["rank"] == 0 and "all_gb_s" in leader:
            where = f"all-reduce of {leader['all_mb']} MB over {leader['num_ranks']} ranks"
            print(f"{where}: {leader['all_gb_s']:.3g} GB/s (bus bandwidth)")
    for line in [*verdict.troubles, *verdict.notes]:
        print(line)
    print(verdict.line())


if __name__ == "__main__":
    main()
