"""The report of a run: at each validation and at the end, however that comes; nothing that it does ends the run."""

import json
from pathlib import Path

import pytest

from running import Sft
from sft.report import page
from sft.training import reporting

SETTINGS = ("run=run", "max_steps=3", "val_every=1", "export=false")


def test_the_report_is_written_again_and_says_how_it_ended(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said, original = [], page.write

    def write(folder: Path, status: dict[str, object] | None = None) -> None:
        original(folder, status=status)
        text = (folder / "report.html").read_text()
        said.append(text.partition('<b class="badge')[2].partition("</b>")[0].partition(">")[2])

    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr(reporting, "SHARE", 1e9)  # each time
    time_is_up = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 2}", "max_time=1:00:00")
    assert sft.train(*SETTINGS, *time_is_up) == 75
    assert said == ["running", "running", "interrupted"]
    assert sft.train(*SETTINGS) == 0
    assert said[3:] == ["running", "running", "finished", "finished"]
    assert "  report            runs/run/report.html\n" in capsys.readouterr().out


def test_reports_take_little_of_the_time_and_one_that_can_not_be_written_is_one_line(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(folder: Path, status: dict[str, object] | None = None) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(page, "write", write)
    monkeypatch.setattr(reporting, "SHARE", 1e-9)
    assert sft.train(*SETTINGS) == 0
    line = "runs/run/report.html can't be written: OSError: no space left on device\n"
    assert capsys.readouterr().out.count(line) == 3  # the first, and two at the end


@pytest.mark.parametrize("pid", [None, 1])
def test_another_process_run_and_what_is_no_run_have_no_report_of_ours(pid: int | None, tmp_path: Path) -> None:
    if pid:
        (tmp_path / "status.json").write_text(json.dumps({"state": "running", "pid": pid}))
    reporting.write(tmp_path)
    assert not (tmp_path / "report.html").exists()
