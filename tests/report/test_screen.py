"""What a terminal shows of a run, to the letter."""

import dataclasses
import io
import math
from array import array
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from sft.report.overview import table
from sft.report.progress import Progress
from sft.report.screen import news, sparkline, view
from sft.runs.answers_file import Answer
from sft.runs.events import Event
from sft.runs.metrics_file import Curve
from sft.runs.plain import plain

NOW = 1772366400.0  # 2026-03-01, 12:00 UTC


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    import time

    time.tzset()


def curve(values: dict[int, float]) -> Curve:
    return Curve(array("q", values), array("d", values.values()))


def event(time: str, kind: str, **details: object) -> Event:
    return {"time": f"{time}+00:00", "event": kind, **details}  # type: ignore[typeddict-item]


def shown(what: RenderableType, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())


STORY = (
    event("2026-02-28T23:10:00", "submit", job=12, restart=0, options=[]),
    event("2026-03-01T11:40:00", "start", job=12, restart=1, step=0, hosts=["n1", "n2"], num_ranks=8),
    event("2026-03-01T11:45:00", "save", job=12, restart=1, step=10, seconds=1.23),
    event("2026-03-01T11:50:00", "save", job=12, restart=1, step=20, seconds=1.23),
    event("2026-03-01T11:51:00", "alert", step=25, title="loss spike", text="3.2 is \u202enot\x1b[2J 1.1"),
    event("2026-03-01T11:52:00", "alert", step=25, title="Stop tokens fail", text="step 25: no end"),
)
RUN = Progress(
    Path("runs/gsm8k-1a2b3c4d"),
    "running",
    step=32,
    num_steps=1000,
    loss=2.0,
    val_loss=2.5,
    hosts=("n1", "n2"),
    job=12,
    taken=3661,
    left=59.6,
    story=STORY,
)
CURVES = {
    "train/loss": curve({step: 8.0 * 0.5 ** (step / 16) for step in range(1, 33)}),
    "val/loss": curve({0: 9.0, 16: 2.25, 32: 2.5}),
    "train/lr": curve({step: 1e-4 * step / 32 for step in range(1, 33)}),
    "train/grad_norm": curve({1: 1.0, 16: math.nan, 32: 2.0}),
    "train/tokens_per_second": curve({}),
    "train/epoch": curve({32: 0.032}),
    "train/tokens": curve({32: 1234567.0}),
}
ANSWER: Answer = {
    "step": 16,
    "number": 0,
    "source": "test.jsonl",
    "row": 3,
    "prompt": "How many legs\nhave 3 cats?",
    "reference": "12",
    "base": None,
    "answer": "Cats have [bold] many, many, many, many, many, many, many, many legs",
    "score": 0.25,
    "base_score": None,
    "num_tokens": 10,
    "num_reference_tokens": 2,
    "stopped": False,
}


SCREENS = {
    (80, 40): """
gsm8k-1a2b3c4d  running  on n1, n2  job 12, restart 1
━───────────────────────────────────  32/1,000  3%  0:01:00 left  1:01:01 so far
epoch 0.03   1,234,567 tokens

                     first       best        now
training loss       7.6608                2.0000  ███▇▇▇▇▆▆▆▆▅▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▁▁▁
validation loss     9.0000     2.2500     2.5000  ██████████████▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▂
learning rate                           1.00e-04  ▁▁▂▂▂▂▃▃▃▃▄▄▄▄▅▅▅▅▅▆▆▆▆▇▇▇▇███
gradient norm                                  2  ▁▁▁▁▁▁▁▁▁▁▁▁▁▁!!!!!!!!!!!!!!!█

answer after step 16, score 0.25, cut
  prompt     How many legs\\nhave 3 cats?
  reference  12
  answer     Cats have [bold] many, many, many, many, many, many, many, many le…

Feb 28 23:10  submit    job 12
11:40:00      start     step 0, on n1, n2, 8 ranks
11:50:00      save      step 20, in 1.2 s
11:51:00      alert     step 25, loss spike: 3.2 is \\u202enot\\x1b[2J 1.1
11:52:00      alert     Stop tokens fail: step 25: no end
""",
    (50, 15): """
gsm8k-1a2b3c4d  running  on n1, n2  job 12, resta…
━─────────────────────  32/1,000  3%  0:01:00 left
epoch 0.03   1,234,567 tokens

                       now
training loss       2.0000  ██▇▇▇▆▆▆▅▅▅▄▄▄▃▃▃▂▂▂▁▁
validation loss     2.5000  ██████████▁▁▁▁▁▁▁▁▁▁▁▂
learning rate     1.00e-04  ▁▁▂▂▂▃▃▃▄▄▄▅▅▅▆▆▆▇▇▇██
gradient norm            2  ▁▁▁▁▁▁▁▁▁▁!!!!!!!!!!!█

answer after step 16, score 0.25, cut
  prompt     How many legs\\nhave 3 cats?
  reference  12
  answer     Cats have [bold] many, many, many, m…
""",
    (40, 11): """
gsm8k-1a2b3c4d  running  on n1, n2  job…
────────────  32/1,000  3%  0:01:00 left
epoch 0.03   1,234,567 tokens

                       now
training loss       2.0000  █▇▇▆▆▅▄▄▃▂▂▁
validation loss     2.5000  █████▁▁▁▁▁▁▂
learning rate     1.00e-04  ▁▂▃▃▄▄▅▆▆▇▇█
gradient norm            2  ▁▁▁▁▁!!!!!!█

11:52:00      alert     Stop tokens fai…
""",
}


@pytest.mark.parametrize("size", SCREENS, ids=str)
def test_the_whole_screen_at_any_size(size: tuple[int, int]) -> None:
    width, height = size
    printed = shown(view(RUN, CURVES, ANSWER, width, height, NOW), width)
    assert printed == SCREENS[size][1:]
    assert len(printed.splitlines()) <= height


@pytest.mark.parametrize(
    ("values", "last", "width", "log", "expected"),
    [
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, 4, 5, False, " ▃▅▆█"),  # from 0: 1/4, 2/4, ... of seven eighths
        ({0: 1.0, 1: 2.0, 2: 4.0, 3: 128.0}, 3, 4, True, "▁▂▃█"),  # 0, 1, 2 and 7 of 7 doublings
        ({0: 0.0, 1: 7.0}, 1, 2, True, "▁█"),  # no logarithm of 0
        ({0: -7.0, 1: 0.0}, 1, 2, False, "▁█"),
        ({0: 1.0, 1: 3.0, 2: 7.0, 3: 7.0}, 3, 2, False, "▃█"),  # means of 2 and 7
        ({3: 7.0}, 7, 8, False, "   █████"),
        ({0: 7.0, 1: math.inf, 2: math.nan, 3: 7.0}, 3, 4, True, "▁!!▁"),
        ({0: 0.0}, 0, 3, False, "▁▁▁"),
        ({0: math.nan}, 0, 3, False, "!!!"),
    ],
)
def test_sparkline(values: dict[int, float], last: int, width: int, log: bool, expected: str) -> None:
    assert sparkline(curve(values), last, width, log) == expected


def test_a_long_curve_costs_no_more_than_its_width() -> None:
    long = curve({step: float(step) for step in range(100_000)})
    assert sparkline(long, 99_999, 8) == "▁▂▃▄▅▆▇█"


def test_text_of_the_data_moves_nothing() -> None:
    text = "a\nb\tc\x1b[2J\x9b\u202eevil\u2066\u200b\ufeff\u2028\ud800 [red]é漢👩\u200d🔬"
    assert plain(text) == (r"a\nb\tc\x1b[2J\x9b\u202eevil\u2066\u200b\ufeff\u2028\ud800 [red]é漢👩" + "\u200d🔬")


def test_lines_of_what_is_new() -> None:
    before = dataclasses.replace(RUN, story=STORY[:2], state="queued")
    assert news(before, RUN, is_validated=True, now=NOW) == [
        "gsm8k-1a2b3c4d  11:50:00  save      step 20, in 1.2 s",
        "gsm8k-1a2b3c4d  11:51:00  alert     step 25, loss spike: 3.2 is \\u202enot\\x1b[2J 1.1",
        "gsm8k-1a2b3c4d  11:52:00  alert     Stop tokens fail: step 25: no end",
        "gsm8k-1a2b3c4d  step 32/1000  training loss 2.0000  validation loss 2.5000  0:01:00 left",
        "gsm8k-1a2b3c4d  running at step 32",
    ]
    assert news(RUN, dataclasses.replace(RUN, state="failed", error="E: [1]\x07"), is_validated=False, now=NOW) == [
        "gsm8k-1a2b3c4d  failed at step 32: E: [1]\\x07"
    ]
    assert news(RUN, RUN, is_validated=False, now=NOW) == []


TABLES = {
    100: """
run              state           step   training loss   validation loss      left   job
────────────────────────────────────────────────────────────────────────────────────────────────────
gsm8k-1a2b3c4d   running      32/1000          2.0000            2.5000   0:01:00    12   ──────────
b                finished   1000/1000          2.0000            2.5000              12   ━━━━━━━━━━
next             queued           0/?                                                13   ──────────
""",
    60: """
run              state           step      left
────────────────────────────────────────────────────────────
gsm8k-1a2b3c4d   running      32/1000   0:01:00   ──────────
b                finished   1000/1000             ━━━━━━━━━━
next             queued           0/?             ──────────
""",
    30: """
run              state
─────────────────────────
gsm8k-1a2b3c4d   running
b                finished
next             queued
""",
}
RUNS = [
    RUN,
    dataclasses.replace(RUN, folder=Path("runs/b"), state="finished", exit_code=0, step=1000, left=math.nan),
    Progress(Path("runs/next"), "queued", job=13),
]
SEVERAL = ("run", "state", "step", "training loss", "validation loss", "left", "job")


@pytest.mark.parametrize("width", TABLES)
def test_several_runs_as_wide_as_there_is_room(width: int) -> None:
    printed = shown(table(RUNS, SEVERAL, width, with_bar=True), 1000)
    assert printed == TABLES[width][1:]
