"""Runs side by side on one page: what differs first, then figures, curves over one another, and answers."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sft.config.check import shown
from sft.report import curves, page
from sft.report.answers import MOST_PROMPTS, cut, facts
from sft.report.folder import Folder
from sft.report.headline import chosen_step, newest
from sft.report.html import escaped, figure, section, table
from sft.report.recipe import cleaner
from sft.runs.answers_file import Answer
from sft.runs.files import write_text
from sft.runs.metric import find
from sft.runs.results import Result, differing

MOST_RUNS = 16  # of curves and answers
MOST_CURVES = 40
LENGTH = 1500  # characters of a text


def write(results: Sequence[Result], path: Path) -> None:
    """Writes the page of these runs, the best first; that of a single run is its report."""
    if len(results) == 1:
        page.write(results[0].folder, path)
        return
    written = time.time()
    folders = [Folder.read(result.folder) for result in results]
    few = folders[:MOST_RUNS]
    plot = curves.Plot(few)
    left_out = f"Of the first {MOST_RUNS} of {len(results)} runs." if len(results) > MOST_RUNS else ""
    parts = [
        f'<p class="lead">{escaped(sentence(results))}</p>',
        section("differing", "What differs", settings(results, folders)),
        section("figures", "Figures", figures(folders), "Those of the exported step, else the last; the best is bold."),
        section("curves", "Curves", page.CONTROLS + charts(few, plot), left_out),
        section("samples", "Answers to the same prompts", samples(few), left_out),
    ]
    names = ", ".join(folder.name for folder in folders[:3]) + (", …" if len(folders) > 3 else "")
    data = {**plot.data(), "samples": {"steps": [], "shown": 0, "answers": {}}}
    state = f'<p class="state">{len(folders)} runs</p>'
    write_text(path, page.document(f"{names}: compared", sentence(results), state, parts, data, written))


def sentence(results: Sequence[Result]) -> str:
    """Which run is the best, by how much, and what it is."""
    measured = [result for result in results if not math.isnan(result.last)]
    if not measured:
        return f"{len(results)} runs, none of which is validated yet."
    best, *others = measured
    if not others:
        return f"Only {best.name} is validated: its loss is {figure(best.last)} nats a token."
    names = list(differing([best, others[0]]).items())
    second = others[0]
    changes = [
        f"{name} {shown(best.settings.get(full))}, not {shown(second.settings.get(full))}" for full, name in names
    ]
    by = f" ({'; '.join(changes)})" if 1 <= len(changes) <= 3 else ""
    ahead = f"{figure(second.last - best.last, 2)} below" if second.last > best.last else "the same as"
    lowest = f"{best.name} has the lowest validation loss of {len(results)} runs, {figure(best.last)}"
    return f"{lowest}, {ahead} {second.name}{by}."


def settings(results: Sequence[Result], folders: Sequence[Folder]) -> str:
    """A row a setting in which runs differ, a column a run."""
    names = [name for name in differing(list(results)) if not name.endswith("._partial_")]
    if not names:
        return "<p>No setting that decides the numbers.</p>"
    rows = []
    for name in names:
        # With its name before it, so that a secret one is seen to be one.
        values = [
            cleaner(folder)(f"{name}={shown(result.settings.get(name))}").partition("=")[2]
            for result, folder in zip(results, folders, strict=True)
        ]
        rows.append([f"<code>{escaped(name)}</code>", *(f"<code>{escaped(value[:200])}</code>" for value in values)])
    return table(("setting", *(escaped(result.name) for result in results)), rows)


def figures(folders: Sequence[Folder]) -> str:
    """A row a metric, a column a run, the best value marked where one is better."""
    rows = [
        ["state", *(escaped(folder.state) for folder in folders)],
        ["step", *(f"{folder.step:,} of {folder.status.get('num_steps', '?')}" for folder in folders)],
    ]
    for column in ordered(folders):
        if not column.startswith(("val/", "answers/")) and column != "train/loss":
            continue
        values = [folder.last(column, chosen_step(folder)) for folder in folders]
        rows.append([escaped(column), *marked(values, best_of(column))])
    speeds = [median(folder, "train/tokens_per_second") for folder in folders]
    if any(speed is not None for speed in speeds):
        rows.append(["train/tokens_per_second, median", *marked(speeds, max)])
    return table(("", *(escaped(folder.name) for folder in folders)), rows, range(1, len(folders) + 1))


def best_of(column: str) -> Callable[[list[float]], float] | None:
    metric = find(column)
    return {"min": min, "max": max}.get(metric.best or "") if metric else None


def marked(values: Sequence[float | None], best: Callable[[list[float]], float] | None) -> list[str]:
    """The values as cells, the best in bold unless all are as good."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    winner = best(known) if best and len(set(known)) > 1 else None
    return [f"<b>{figure(value)}</b>" if value == winner and value is not None else figure(value) for value in values]


def median(folder: Folder, column: str) -> float | None:
    _, values = folder.points(column)
    return float(np.median(values)) if len(values) else None


def ordered(folders: Sequence[Folder]) -> list[str]:
    """All metrics of the runs, in the order of a report."""
    columns = list(dict.fromkeys(name for folder in folders for name in curves.measured(folder)))
    groups = curves.assigned(columns)
    return [name for charts in groups.values() for _, shown_there in charts for name in shown_there]


def charts(folders: Sequence[Folder], plot: curves.Plot) -> str:
    """A chart a metric, a curve a run."""
    made = "".join(
        plot.chart(column, {column: column}, curves.unit(column), wide=column in ("train/loss", "val/loss"))
        for column in ordered(folders)[:MOST_CURVES]
    )
    return f'<div class="charts">{made}</div>' if made else ""


def samples(folders: Sequence[Folder]) -> str:
    """The prompts that several runs have answered, each with all their answers."""
    answers: list[dict[tuple[str, int, str], Answer]] = [
        {(answer["source"], answer["row"], answer["prompt"]): answer for answer in newest(folder)} for folder in folders
    ]
    prompts = list(dict.fromkeys(key for of_run in answers for key in of_run))
    shared = [key for key in prompts if sum(key in of_run for of_run in answers) > 1]
    cards = []
    for key in shared[:MOST_PROMPTS]:
        given = [(folder.name, of_run[key]) for folder, of_run in zip(folders, answers, strict=True) if key in of_run]
        source, row, prompt = key
        columns = "".join(_column(name, answer) for name, answer in given)
        reference = escaped(cut(given[0][1]["reference"], LENGTH))
        cards.append(
            f'<article class="sample"><header><span>{escaped(source)}, row {row}</span></header>'
            f'<pre class="prompt" dir="auto">{escaped(cut(prompt, LENGTH))}</pre><div class="answers">{columns}'
            f'<div class="reference"><h4>reference</h4><pre dir="auto">{reference}</pre></div></div></article>'
        )
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _column(name: str, answer: Answer) -> str:
    text = escaped(cut(answer["answer"], LENGTH))
    score: Any = answer["score"]
    return (
        f'<div class="tuned"><h4>{escaped(name)}</h4><pre dir="auto">{text}</pre><p class="score">'
        f'<meter min="0" max="1" value="{score:.4f}"></meter><output>{score:.2f}</output> '
        f'<small class="said">{escaped(facts(answer))}</small></p></div>'
    )
