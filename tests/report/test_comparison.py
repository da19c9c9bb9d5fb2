"""Runs side by side on a page."""

import re
from pathlib import Path

import pytest

import whole_run
from running import Sft
from sft.report.comparison import marked
from sft.report.html import figure


@pytest.fixture
def runs(sft: Sft) -> Sft:
    for name, changes in {"a": {}, "b": {"lr": 3e-5, "seed": 1, "state": "failed"}, "c": {}}.items():
        whole_run.write(Path("runs") / name, 20, 10, **changes)
    return sft


def test_what_differs_comes_first(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("compare", "runs/a", "runs/b", "html=page.html") == 0
    assert capsys.readouterr().out.endswith("written: page.html\n")
    text = Path("page.html").read_text()
    assert re.findall(r'<section id="(\w+)">', text) == ["differing", "figures", "curves", "samples"]
    table = text.partition('id="differing"')[2].partition("</section>")[0]
    cells = re.findall(r"<code>([^<]*)</code>", table)
    assert cells == ["optimizer.lr", "1e-05", "3e-05", "seed", "0", "1"]
    assert text.count('<article class="sample">') == 4 and "sk-very-secret" not in text
    assert text.count("data-chart=") == 40  # a chart a metric, a curve a run


def test_the_best_figures_are_marked() -> None:
    assert marked([0.5, 0.25, None], min) == ["0.5", "<b>0.25</b>", "–"]
    assert marked([0.5, 0.25], max) == ["<b>0.5</b>", "0.25"]
    assert marked([0.5, 0.5], min) == [figure(0.5)] * 2
    assert marked([0.5, float("nan")], None) == ["0.5", "–"]


def test_the_page_of_one_run_is_its_report(runs: Sft) -> None:
    assert runs("compare", "a", "html=runs/a/report.html") == 0
    assert "<title>a</title>" in Path("runs/a/report.html").read_text()


def test_a_page_that_can_not_be_written(runs: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs("compare", "a", "b", "html=nowhere/page.html") == 2
    assert capsys.readouterr().err.startswith("sft: html=nowhere/page.html: there is no folder ")
