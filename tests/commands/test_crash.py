"""What isn't expected, Ctrl-C, and a reader that leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mishaps import signal_at
from running import Sft
from sft.training.module import SFTModule

RAISE = "+callbacks.raises={_target_: mishaps.Mishap, step: 2, rank: 0, what: raise}"


@pytest.mark.parametrize("traceback", [False, True])
def test_an_error_of_ours(
    sft: Sft, traceback: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if traceback:
        monkeypatch.setenv("SFT_TRACEBACK", "1")
    assert sft.train("run=run", RAISE) == 1
    *trace, first, second, third = capsys.readouterr().err.splitlines()
    assert ("Traceback (most recent call last):" in trace) == traceback
    (report,) = sft.run_folder().glob("crash-*.txt")
    assert first == "sft: ArithmeticError: the mishap of rank 0"
    assert (
        second.startswith("  at ")
        and "mishaps.py:" in second
        and second.endswith(f": {report.relative_to(sft.folder)}")
    )
    assert third == "  report it to the maintainers of your copy of sft, with that file"
    assert "raise ArithmeticError" in report.read_text()
    assert json.loads((sft.run_folder() / "status.json").read_text())["state"] == "failed"
    assert sft.train("run=run", "+callbacks={}") == 0  # the report is no stranger's file


def test_a_mistake_with_its_traceback(
    sft: Sft, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_TRACEBACK", "1")
    assert sft("generate", "run=none") == 2
    *trace, line = capsys.readouterr().err.splitlines()
    assert trace[0] == "Traceback (most recent call last):"
    assert line == f"sft: there is no run none: runs/ holds none yet (looked in {sft.folder})"


def interrupted_while_the_model_is_loaded() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of a shell in the background ignores it
    signal_at(SFTModule, SFTModule.configure_model, 1, signal.SIGINT)


def test_ctrl_c_before_there_is_a_step_to_save(sft: Sft) -> None:
    ended = sft.process("train", *sft.settings, "run=run", before=interrupted_while_the_model_is_loaded)
    assert ended.code == 130, ended.output
    assert "Traceback" not in ended.output
    assert ended.output.splitlines()[-1] == "sft: interrupted; the same command resumes from the last checkpoint"
    status = json.loads((sft.run_folder() / "status.json").read_text())
    assert (status["state"], status["step"]) == ("interrupted", 0)
    assert not list(sft.run_folder().glob("crash-*"))
    assert sft.train("run=run", "export=false") == 0


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "-h"], ["compare"], ["train", "--cfg", "job"]], ids=" ".join
)
def test_a_reader_that_leaves(sft: Sft, arguments: list[str]) -> None:
    (sft.folder / "runs" / "a").mkdir(parents=True)
    (sft.folder / "runs" / "a" / "config.yaml").write_text("seed: 0\n")
    script = Path(sys.executable).with_name("sft")
    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_ctrl_c_during_the_first_imports_prints_nothing() -> None:
    program = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "sft.cli":
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
import sft.__main__
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
