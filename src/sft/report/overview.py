"""A line for each of several runs, as wide as there is room: columns are left out, numbers never cut."""

import math
import time
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from sft.cluster.time_limit import clock
from sft.report.progress import Progress
from sft.report.screen import shade, share
from sft.runs.lease import duration
from sft.runs.plain import plain

COLUMNS: dict[str, Callable[[Progress], str]] = {
    "run": lambda run: plain(run.folder.name),
    "state": lambda run: run.state,
    "step": lambda run: f"{run.step}/{run.num_steps or '?'}",
    "time": lambda run: _clock(run.taken),
    "left": lambda run: _clock(run.left),
    "training loss": lambda run: _loss(run.loss),
    "validation loss": lambda run: _loss(run.val_loss),
    "host": lambda run: (
        plain(run.hosts[0]) + (f" + {len(run.hosts) - 1}" if run.hosts[1:] else "") if run.hosts else ""
    ),
    "job": lambda run: str(run.job or ""),
    "changed": lambda run: "" if math.isnan(run.changed) else _ago(time.time() - run.changed),
}
FIRST_TO_GO = ("job", "time", "host", "changed", "training loss", "validation loss", "left", "step")
BETWEEN = 3  # characters
LEAST, MOST = 10, 40  # characters of a bar


def table(runs: Sequence[Progress], columns: Sequence[str], width: int, with_bar: bool = False) -> Group:
    """Those of the columns that fit; at their end, with what is left of the width, a bar of the steps."""
    cells = {name: [COLUMNS[name](run) for run in runs] for name in columns}
    cells = {name: values for name, values in cells.items() if any(values)}
    takes = {name: max(map(cell_len, (name, *values))) for name, values in cells.items()}
    for name in FIRST_TO_GO:
        if sum(takes.values()) + BETWEEN * (len(takes) - 1) > width:
            takes.pop(name, None)
    room = min(MOST, width - sum(takes.values()) - BETWEEN * len(takes)) if with_bar else 0
    rows = []
    for at, run in enumerate(runs):
        row = [Text(_padded(name, cells[name][at], takes[name])) for name in takes]
        row[list(takes).index("state")].stylize(shade(run.state))
        rows.append(Text(" " * BETWEEN).join([*row, *([share(run, room)] if room >= LEAST else [])]))
    head = (" " * BETWEEN).join(_padded(name, name, takes[name]) for name in takes)
    rule = "─" * max(len(head), *(row.cell_len for row in rows))
    return Group(Text(head), Text(rule), *rows)


def _padded(column: str, text: str, width: int) -> str:
    pad = " " * (width - cell_len(text))
    return text + pad if column in ("run", "state", "host") else pad + text


def _clock(seconds: float) -> str:
    return "" if math.isnan(seconds) else clock(seconds)


def _loss(loss: float) -> str:
    return "" if math.isnan(loss) else format(loss, ".4f")


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s ago" if seconds < 90 else f"{duration(seconds)} ago"
