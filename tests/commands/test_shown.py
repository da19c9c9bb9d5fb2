"""What sft train prints: a bar on a terminal, lines elsewhere, and what a user has asked of Lightning."""

import json
import re
import sys
from pathlib import Path

import pytest

from running import Sft

SETTINGS = ("run=run", "max_steps=3", "export=false", "val_every=2")
STEP_LINE = r"step 1/3  loss "


def make_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")


def lines(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, a line for each time that one was begun."""
    return capsys.readouterr().out.replace("\r", "\n")


def test_a_bar_on_a_terminal(sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    make_terminal(monkeypatch)
    assert sft.train(*SETTINGS) == 0
    shown = lines(capsys)
    assert not re.search(STEP_LINE, shown)
    assert re.search(r"100%\|█+\| 3/3 \[.*, loss \d\.\d{4}, [\d,]+ tokens/s\]", shown)
    for line in (r"step 2: validation loss [\d.]+, perplexity [\d.,]+", r"step 2: saved \S+"):
        assert re.search(rf"^{line}$", shown, re.MULTILINE), line  # beside no bar


def test_a_bar_of_a_resumed_run_starts_at_its_step(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_terminal(monkeypatch)
    time_is_up = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 2}", "max_time=1:00:00")
    assert sft.train(*SETTINGS, *time_is_up) == 75
    assert re.search(r"^stopped by max_time after step 2: .*$", lines(capsys), re.MULTILINE)
    assert sft.train(*SETTINGS) == 0
    bars = re.findall(r"\| (\d)/3 \[", lines(capsys))
    assert (bars[0], bars[-1]) == ("2", "3")


def test_lines_where_there_is_no_terminal(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train(*SETTINGS) == 0
    shown = capsys.readouterr()
    assert re.search(f"^{STEP_LINE}", shown.out, re.MULTILINE)
    assert "%|" not in shown.out and not shown.err


def test_a_users_bar_takes_the_place_of_ours(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_terminal(monkeypatch)
    bar = "+callbacks.bar._target_=lightning.pytorch.callbacks.TQDMProgressBar"
    assert sft.train(*SETTINGS, bar) == 0
    shown = lines(capsys)
    assert "Epoch 0: 100%|" in shown and "/3 [" not in shown


def test_what_lightning_says_by_itself_is_not_shown_and_what_was_asked_for_is(sft: Sft) -> None:
    asked = ("trainer.profiler=simple", "+callbacks.summary._target_=lightning.pytorch.callbacks.ModelSummary")
    for settings in ((), asked):
        two = ("strategy=ddp", "trainer.devices=2", "micro_batch_size=1", "trainer.precision=bf16-mixed")
        ended = sft.process("train", *sft.settings, *SETTINGS, f"run=run{len(settings)}", *two, *settings)
        assert ended.code == 0, ended.output
        for line in ("TPU available", "Tip:", "stopped: `max_epochs", "distributed", "Mixed Precision"):
            assert line not in ended.output, ended.output
        for line in ("FIT Profiler Report", "run_training_batch", "LlamaForCausalLM", "Total params"):
            assert (line in ended.output) is bool(settings), line


def test_what_the_data_gave(sft: Sft, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train(*SETTINGS) == 0
    line = "data: 57 training samples, 3 held out for validation; 0 of 60 rows lost\n"
    assert line in capsys.readouterr().out
    given = data_file.read_text().splitlines()
    lost = [{"prompt": "a " * 400, "response": "b"}, {"prompt": "a", "response": ""}, {"prompt": "b", "response": ""}]
    (sft.folder / "own.jsonl").write_text("\n".join([*given, *map(json.dumps, lost)]) + "\n")
    held = [*given, json.dumps({"prompt": "what else", "response": "nothing"})]
    (sft.folder / "held.jsonl").write_text("\n".join(held) + "\n")
    own = ("run=own", "data.path=own.jsonl", "data.val_path=held.jsonl")
    assert sft.train(*SETTINGS, *own) == 0
    line = "data: 60 training samples, 61 for validation; 3 of 124 rows lost: 2 empty response, 1 overlong\n"
    shown = capsys.readouterr().out
    assert line in shown
    assert "60 of 61 validation samples are also in training\n" in shown
    assert sft.train(*SETTINGS, *own, "run=cut", "data.overlong=truncate_prompt") == 0
    assert "61 training samples, 61 for validation; 2 of 124 rows lost: 2 empty response; 1 prompts cut\n" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("no_color", [None, "1"])
def test_preview_marks_without_colour_where_there_is_none(
    sft: Sft, no_color: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich a terminal
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    assert sft("preview", *sft.settings, "preview.packs=1") == 0
    shown = capsys.readouterr().out
    assert ("[[" in shown.partition("pack 0")[2]) is bool(no_color)
    assert ("between [[ and ]]" in shown, "green and bold" in shown) == (bool(no_color), not no_color)
