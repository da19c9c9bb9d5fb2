"""`report.html`: what a run learned and what it was, in one file that can be sent round, made of its folder alone."""

import json
import re
import time
from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

from sft.report import answers, curves, headline, recipe, story
from sft.report.folder import Folder
from sft.report.html import escaped, figure, more, section, table
from sft.report.ledger import ledger
from sft.report.stopping import stopping
from sft.runs.files import write_text

FILES = Path(__file__).parent
NAME = "report.html"
MOST_VALIDATIONS = 60  # rows of the table


def write(folder: Path, path: Path | None = None, status: Mapping[str, Any] | None = None) -> None:
    """Writes the report of a run's folder, into it unless `path` is another place. `status`: as in `Folder.read`."""
    write_text(path or folder / NAME, report(Folder.read(folder, status), time.time()))


def report(folder: Folder, written: float) -> str:
    """The page; `written`: the time, in seconds since the epoch."""
    clean = recipe.cleaner(folder)
    said = headline.sentence(folder)
    plot = curves.Plot([folder])
    figures = curves.page(plot, curves.assigned(curves.measured(folder)))
    samples, answer_data, left_out = answers.cards(folder)
    error = folder.status.get("error") if folder.state == "failed" else ""
    before_and_after = f'{SLIDER}<div class="samples">{samples}</div>' if samples else ""
    parts = [
        f'<p class="lead">{escaped(said)}</p>',
        f'<p class="verdict bad">{escaped(clean(error))}</p>' if error else "",
        alerts(folder, clean),
        tiles(folder),
        section("samples", "Before and after", before_and_after, left_out),
        section("curves", "Curves", CONTROLS + figures + validations(folder) if figures else ""),
        section("stopping", "Does it stop?", stopping(folder)),
        section("data", "Data", ledger(folder.ledger)),
        section("recipe", "Recipe", recipe.recipe(folder, clean)),
        section("timeline", "What happened", story.timeline(folder.events, clean)),
        section("cost", "Cost", story.cost(folder, written)),
        section("use", "Use the model", recipe.use(folder, clean)),
        section("again", "Make it again", recipe.again(folder, clean)),
    ]
    data = {**plot.data(), "samples": answer_data}
    return document(folder.name, said, headline.progress(folder, written), parts, data, written, folder.running)


CONTROLS = (
    '<form class="controls"><label>x-axis <select id="axis"></select></label>'
    '<label><input type="checkbox" id="log"> log scale</label>'
    '<button type="button" id="reset" hidden>show all steps</button>'
    "<small>drag to zoom, double-click to reset, click a name to hide its curve</small></form>"
)
SLIDER = (
    '<form class="controls" id="steps" hidden>'
    '<label>step <input type="range" id="answer-step" min="0" step="1"></label><output id="answer-at"></output></form>'
)


def document(
    title: str, said: str, state: str, parts: list[str], data: Mapping[str, Any], written: float, running: bool = False
) -> str:
    """The whole file: nothing of it is loaded from elsewhere, and no text of a run can be run as a script."""
    style = _file("style.css")
    scripts = [_file("charts.js"), _file("page.js")]
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; "
        f"style-src '{_hash(style)}'; script-src {' '.join(repr(_hash(script)) for script in scripts)}"
    )
    content = "".join(parts)
    moment = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    page = Template(_file("page.html")).substitute(
        policy=policy,
        refresh='<noscript><meta http-equiv="refresh" content="60"></noscript>' if running else "",
        title=escaped(title),
        said=escaped(said),
        style=style,
        state=state,
        nav=_nav(content),
        content=content,
        written=f'<time id="written" datetime="{int(written)}" data-running="{int(running)}">{moment}</time>',
        # No text of a run may end the element.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        scripts="".join(f"<script>{script}</script>" for script in scripts),
    )
    return page.encode("ascii", "xmlcharrefreplace").decode()  # whatever a server takes its encoding for


def _file(name: str) -> str:
    return (FILES / name).read_text(encoding="ascii")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(sha256(text.encode()).digest()).decode()}"


def _nav(content: str) -> str:
    return "".join(
        f'<a href="#{name}">{title}</a>' for name, title in re.findall(r'<section id="(\w+)"><h2>([^<]*)</h2>', content)
    )


def tiles(folder: Folder) -> str:
    cells = "".join(
        f"<div><dt>{escaped(name)}</dt><dd>{escaped(value)}</dd><dd class='remark'>{escaped(remark)}</dd></div>"
        for name, value, remark in headline.tiles(folder)
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def alerts(folder: Folder, clean: recipe.Clean) -> str:
    """The last alerts, of which trackers have told, too."""
    found = [event for event in folder.events if event["event"] == "alert"][-3:]
    lines = [clean(" ".join(str(dict(event).get(key) or "") for key in ("title", "text"))) for event in found]
    return "".join(f'<p class="verdict bad">{escaped(line)}</p>' for line in lines)


def validations(folder: Folder) -> str:
    """The validations as a table, which needs no script."""
    names = [name for name in curves.measured(folder) if name.startswith(("val/", "answers/"))][:12]
    if not names:
        return ""
    steps = sorted({int(step) for name in names for step in folder.points(name)[0]})
    shown = answers.spaced(steps, MOST_VALIDATIONS, steps[-1])
    values = {name: dict(zip(*(part.tolist() for part in folder.points(name)), strict=True)) for name in names}
    rows = [[f"{step:,}", *(figure(values[name].get(step)) for name in names)] for step in shown]
    header = ("step", *(escaped(name) for name in names))
    note = f"; {len(shown)} of {len(steps)}" if len(shown) < len(steps) else ""
    return more(f"All validations as a table{note}", table(header, rows, range(len(header))))
