"""The report of a run that wrote everything, of one that wrote little, and of files that are broken."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import whole_run
from sft.report import page
from sft.report.answers import cut, spaced
from sft.report.curves import Plot, spread, trailing_mean
from sft.report.folder import Folder, read_columns
from sft.report.headline import sentence
from sft.report.html import duration, escaped, figure
from sft.report.story import attempts

SECTIONS = ["samples", "curves", "stopping", "data", "recipe", "timeline", "cost", "use", "again"]


class Elements(HTMLParser):
    """The elements of a page, each with its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run.write(tmp_path_factory.mktemp("whole") / "run")


def written(folder: Path) -> Elements:
    page.write(folder)
    return Elements((folder / "report.html").read_text())


def test_a_whole_run(whole: Path) -> None:
    elements = written(whole)
    assert [of["id"] for name, of in elements.found if name == "section"] == SECTIONS
    for said in (
        "Validation loss fell from 1.92 to 0.4202 nats a token (−78.1 % ± 0.6 %) in 400 steps. "
        "Its answer is better than the base model's on 4 of 4 held-out prompts (mean score 1.00, base 0.10).",
        "The model stops where its references stop.",
        "12 overlong",
        "433 samples of training are held out for validation",
        "NVIDIA H100 80GB HBM3",
        "stopped by SIGUSR1",
        "8 on n1, n2",
        "3.12 GPU-hours",
        "AutoModelForCausalLM.from_pretrained(folder)",
        "63a0a019e3afabd7c6552547d938e72eb107466a and the changes below",
    ):
        assert said in elements.text, said
    assert "steps 50 to 200, 4 times, 1.25 s each" in elements.text  # one line


def test_nothing_is_loaded_from_elsewhere_and_only_our_scripts_run(whole: Path) -> None:
    elements = written(whole)
    text = (whole / "report.html").read_bytes().decode("ascii")
    assert len(text) < 3_000_000
    (policy,) = (of["content"] for _, of in elements.found if of.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'; img-src data:; ")
    for name in ("style", "script"):
        allowed = re.findall(rf"{name}-src ([^;]*)", policy)[0].split()
        parts = re.findall(rf"<{name}>(.*?)</{name}>", text, re.S)
        assert allowed == [f"'sha256-{b64encode(sha256(part.encode()).digest()).decode()}'" for part in parts]
    links = {value for _, of in elements.found for key, value in of.items() if key in ("src", "href")}
    assert {link for link in links if link and not link.startswith("#")} == {"data:,"}
    assert not [key for _, of in elements.found for key in of if key.startswith("on") or key == "style"]


def test_no_text_of_a_run_is_taken_for_a_part_of_the_page(whole: Path) -> None:
    elements = written(whole)
    names = {name for name, _ in elements.found}
    assert not names & {"img", "iframe", "object", "embed", "base"}
    assert [name for name, _ in elements.found].count("script") == 3  # the data and two of ours
    assert escaped("<\x1b[0m\u202eב") == "&lt;[U+001B][0m[U+202E]ב"
    assert "</script><img src=x onerror=alert(1)> & [U+001B][31m [U+202E]reversed[U+202C]" in elements.text
    text = (whole / "report.html").read_text()
    data = json.loads(text.partition('id="values">')[2].partition("</script>")[0])
    assert data["samples"]["answers"]["400"]["2"][0].startswith("</script><img src=x onerror=alert(1)> & [U+001B]")


def test_what_is_secret_is_left_out(whole: Path) -> None:
    text = written(whole).text
    assert "logger.api_key=***" in text and "password = '***'" in text
    assert "sk-very-secret" not in text and "hunter22" not in text


FILES = ["status.json", "config.yaml", "provenance.json", "data.json", "recipe.json", "metrics.csv", "events.jsonl"]
FILES += ["samples.jsonl", "export/verified.json"]


BROKEN = ("", "{", "[1]", "a,b\n1\n", "step,val/loss\n0,1.5\n1,0.", '{"event": "start"}\n{}\n')


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_or_broken(name: str, tmp_path: Path) -> None:
    folder = whole_run.write(tmp_path / "run", num_steps=20, every=10)
    (folder / name).unlink()
    for text in (None, *BROKEN):
        if text is not None:
            (folder / name).write_text(text)
        assert "Make it again" in written(folder).text or name == "provenance.json"


def test_an_empty_folder(tmp_path: Path) -> None:
    assert "Nothing is measured yet." in written(tmp_path).text


def test_a_run_that_is_being_trained_is_shown_again(tmp_path: Path) -> None:
    finished, running = whole_run.write(tmp_path / "a", 20, 10), whole_run.write(tmp_path / "b", 20, 10)
    status = json.loads((running / "status.json").read_text()) | {"state": "running", "host": "elsewhere"}
    (running / "status.json").write_text(json.dumps(status))
    refreshed = []
    for folder in (finished, running):
        elements = written(folder)
        refreshed += [of["data-running"] for _, of in elements.found if of.get("id") == "written"]
        assert ("refresh" in [of.get("http-equiv") for _, of in elements.found]) == (folder is running)
    assert refreshed == ["0", "1"]


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    text = written(whole_run.write(tmp_path / "run", 20, 10, "failed")).text
    assert "RuntimeError: CUDA error with api_key=***" in text


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("0,,\n", "Nothing is measured yet."),
        ("0,,2.0\n", "Validation loss is 2 nats a token before training."),
        ("0,,2.0\n1,1.9,\n2,1.8,1.0\n", "Validation loss fell from 2 to 1 nats a token (−50.0 %) in 2 steps."),
        ("0,,2.0\n1,1.9,3.0\n", "Validation loss rose from 2 to 3 nats a token (50.0 %) in 1 step."),
        ("1,3.0,\n2,1.5,\n", "Training loss went from 3 to 1.5 nats a token; nothing was held out."),
        (
            "0,,2.0\n1,1.9,1.0\n2,1.8,1.5\n3,1.8,1.8\n",
            "Validation loss fell from 2 to 1.8 nats a token (−10.0 %) in 3 steps. "
            "The loss was lowest at step 1, 1, and has risen since.",
        ),
        ("0,,2.0\n1,nan,nan\n", "Validation loss is 2 nats a token before training."),
    ],
)
def test_headline(rows: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n" + rows)
    assert sentence(Folder.read(tmp_path)) == said


def test_headline_of_a_run_whose_base_is_another_models(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/loss,val/gain,val/gain_error\n5,2.0,,\n9,1.0,-0.25,0.0125\n")
    assert sentence(Folder.read(tmp_path)) == (
        "Validation loss fell from 2 to 1 nats a token (−50.0 %) in 4 steps. "
        "It is 0.25 ± 0.013 nats a token worse than the base model on held-out samples."
    )


def test_the_figures_are_those_of_the_exported_step(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,val/loss\n0,2.0\n1,1.0\n2,1.5\n")
    (tmp_path / "status.json").write_text('{"state": "finished", "exported": 1}')
    assert sentence(Folder.read(tmp_path)) == "Validation loss fell from 2 to 1 nats a token (−50.0 %) in 1 step."


def test_columns_are_read_like_the_csv_module_reads_them(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("step,a,b\n0,,1.5\n1,nan,inf\n2,1e-3\n3,2.0,4.0\n4,2.0,5")
    columns = read_columns(tmp_path / "m.csv")
    assert {name: [repr(float(value)) for value in values] for name, values in columns.items()} == {
        "step": ["0.0", "1.0", "3.0"],
        "a": ["nan", "nan", "2.0"],
        "b": ["1.5", "inf", "4.0"],
    }


def test_a_spike_among_a_million_steps_is_kept() -> None:
    values = np.sin(np.arange(1_000_000) / 1e5)
    values[777_777], values[123_456] = 9.0, -9.0
    kept = spread(values, 500)
    assert len(kept) <= 1002 and {0, 123_456, 777_777, 999_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert spread(np.arange(5.0), 500).tolist() == [0, 1, 2, 3, 4]


def test_the_mean_of_the_last_steps() -> None:
    values = np.array([1.0, 3.0, np.nan, 5.0, 7.0])
    assert trailing_mean(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]


def test_every_point_has_its_place_on_each_axis(whole: Path) -> None:
    plot = Plot([Folder.read(whole)])
    plot.chart("Loss", {"val/loss": "val/loss"}, "nats a token")
    data = plot.data()
    (series,), (run,) = data["charts"][0]["series"], data["runs"]
    assert [run["step"][at] for at in series["x"]] == [0, 50, 100, 150, 200, 250, 300, 350, 400]
    assert [run["tokens"][at] for at in series["x"]][:3] == [0.0, 1_605_000.0, 3_210_000.0]
    assert [run["hours"][at] for at in series["x"]][-1] == pytest.approx(1200 / 3600)
    assert series["y"][0] == 1.92
    assert [(run["step"][at], text) for at, text in run["marks"]] == [
        (200, "resumed after step 200"),
        (203, "step 203: The loss spikes"),
    ]


def test_attempts_and_what_ended_them(whole: Path) -> None:
    told = [(a.first, a.last, a.ranks, a.seconds, a.how) for a in attempts(Folder.read(whole), now=0.0)]
    assert told == [
        (0, 200, 8, 605.0, "stopped by SIGUSR1"),
        (200, 203, 4, 200.0, "lost"),
        (200, 400, 8, 700.0, "finished"),
    ]


def test_texts_are_cut_and_their_line_ends_seen() -> None:
    assert [cut(text, 5) for text in ("\n\na\nb\n", "\n\n\n\n", "", None, "abcdefg", "ab\x00")] == [
        *("↵↵a\nb… (1 more characters)", "[4 ↵]", "(empty)", "(empty)", "abcde… (2 more characters)", "ab[U+0000]"),
    ]
    assert spaced([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 5, always=9) == [0, 3, 7, 9, 10]


def test_numbers_in_words() -> None:
    assert [figure(value) for value in (0.0041237, 12345.678, 0.0, -1.5, 3e-9, float("nan"))] == [
        *("0.004124", "12,346", "0", "−1.5", "3.000e−09", "–"),
    ]
    assert [duration(seconds) for seconds in (0.4, 59, 61, 3600, 7500, 100_000)] == [
        *("0 s", "59 s", "1 min 1 s", "1 h", "2 h 5 min", "1 d 3 h"),
    ]
