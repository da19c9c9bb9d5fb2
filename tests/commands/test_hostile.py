"""Data, names and templates that are hostile or merely odd: shown as they are, handled, or refused in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from running import Sft
from sft.commands.job import pick
from sft.data import chat_template
from sft.errors import UserError
from sft.runs import provenance

SECRET = "k3y-of-the-environment"
REFERENCE = "${oc.env:PLANTED_KEY}"


def rows(folder: Path, *rows: dict[str, object]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


@pytest.mark.parametrize("auto", [True, False])
def test_data_is_never_resolved(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], auto: bool
) -> None:
    """Neither a column's name nor a row, through training, export, generation, score and rehearsal."""
    monkeypatch.setenv("PLANTED_KEY", SECRET)
    many = [{"prompt": f"{REFERENCE} {n}", REFERENCE: f"\\{REFERENCE} {REFERENCE}"} for n in range(60)]
    if not auto:
        many = [{"prompt": f"{row['prompt']}", REFERENCE: row[REFERENCE], "other": "x"} for row in many]
    columns = ["data.conversation.response=\\" + REFERENCE]
    columns += [] if auto else ["data=prompt_response"]
    options = [*sft.settings, rows(sft.folder, *many), "run=r", "max_steps=1", *columns]
    assert sft("preview", *options) == 0
    assert sft("train", *options) == 0, capsys.readouterr().err
    assert sft("generate", "run=r", "--prompt", REFERENCE, "max_new_tokens=2") == 0
    assert sft("score", "run=r", f"data={sft.folder}/rows.jsonl") == 0
    assert sft("export", "run=r", f"output={sft.folder}/again") == 0
    if not auto:
        assert sft("rehearse", *options) == 0
    everything = "".join(capsys.readouterr())
    everything += "".join(
        path.read_bytes().decode(errors="replace") for path in sft.folder.rglob("*") if path.is_file()
    )
    assert SECRET not in everything
    assert REFERENCE in (sft.run_folder("r") / "config.yaml").read_text()


PLANTED = {
    "typed": "pl4nted-on-the-command-line",
    "variable": "pl4nted-in-the-environment",
    "diff": "pl4nted-in-a-tracked-file",
    "url": "pl4nted-in-a-url",
    "shape": "hf_" + "Pl4nted" * 5,
    "callback": "pl4nted-in-a-callback",
}


def test_no_secret_is_written(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Planted in settings, environment, command line, a tracked file and a URL: in no file of the run, whose own code
    is recorded, and the same command resumes it."""
    monkeypatch.setenv("TRACKER_API_KEY", PLANTED["variable"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "own_stop.py").write_text(
        "from lightning.pytorch.callbacks import Callback\n"
        "class Told(Callback):\n    def __init__(self, api_key): self.api_key = api_key\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    git = provenance._git

    def with_diff(*arguments: str, **options: Path) -> str | None:
        planted = f"+export WANDB_API_KEY={PLANTED['diff']}\n+key = '{PLANTED['shape']}'"
        return planted if arguments[0] == "diff" else git(*arguments, **options)

    monkeypatch.setattr(provenance, "_git", with_diff)
    options = [
        "logger=wandb",
        "run=r",
        "max_steps=4",
        "evaluation.samples=1",
        f"+extra.api_key={PLANTED['typed']}",
        f"+extra.other='x {PLANTED['typed']}'",
        "+extra.of_environment=${oc.env:TRACKER_API_KEY}",
        f"+extra.url=https://me:{PLANTED['url']}@example.org/",
        f"+extra.plain={PLANTED['shape']}",
        "+callbacks.told._target_=own_stop.Told",
        f"+callbacks.told.api_key={PLANTED['callback']}",
    ]
    assert sft.train(*options) == 0, capsys.readouterr().err
    assert sft.train(*options) == 0
    assert "is finished" in (said := "".join(capsys.readouterr()))
    assert sft("export", "run=r", f"output={sft.folder}/runs/r/again") == 0
    run = sft.run_folder("r")
    names = [path for path in run.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in names)
    for what, secret in PLANTED.items():
        holding = [str(path.relative_to(run)) for path in names if secret.encode() in path.read_bytes()]
        assert not holding, (what, holding)
        assert secret not in said
    recorded = json.loads((run / "provenance.json").read_text())
    assert recorded["functions"] == {"callbacks.told._target_": "own_stop.Told"}


HOSTILE = "a\x1b[31m\x1b]0;owned\x07b\x9b1m\rc\u202ed\u2066e\x00f\tg\nh"
RAW = [char for char in HOSTILE if char not in "abcdefgh[]0;owned31m\t\n"]


def test_nothing_of_the_data_moves_the_cursor(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    """Not in the preview, on a terminal and as a page, nor in a line of log, report, model card or error."""
    many = [{"prompt": f"{HOSTILE} {n}", "response": HOSTILE} for n in range(30)]
    options = [*sft.settings, rows(sft.folder, *many), "run=r", "max_steps=1", "evaluation.samples=2"]
    assert sft("preview", *options) == 0
    shown = capsys.readouterr().out
    print(shown)
    assert "\\x1b[31m\\x1b]0;owned\\x07b\\x9b1m\\rc\\u202ed\\u2066e\\x00f" in shown and "g\nh" in shown
    assert sft("train", *options) == 0
    wrong = rows(sft.folder, *({HOSTILE: "x", f"{HOSTILE}2": "y"} for _ in range(3)))
    assert sft("train", *sft.settings, wrong, "run=s") == 2
    pages = [sft.run_folder("r") / name for name in ("preview.html", "report.html", "export/README.md", "config.yaml")]
    shown += "".join(capsys.readouterr()) + "".join(page.read_text() for page in pages)
    assert not [char for char in RAW if char in shown]


def test_a_template_that_loops_for_ever(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    file = sft.folder / "endless.jinja"
    file.write_text("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    for command in ("preview", "train"):
        assert sft(command, *sft.settings, f"model.chat_template={file}", "run=r") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("sft: the chat template (model.chat_template") and "takes more than" in line
    assert not sft.run_folder("r").exists()


@pytest.mark.parametrize("setting", ["run=../x", "run=a%j", "run='a;b#c'", "run=-x", "name='a\nb'", f"run={'x' * 300}"])
def test_odd_names_are_refused_in_a_line(sft: Sft, capsys: pytest.CaptureFixture[str], setting: str) -> None:
    for more in ([], ["-m"]):
        assert sft("train", *more, *sft.settings, setting) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not a name of at most 120 bytes" in line
    assert not (sft.folder / "runs").exists() and not (sft.folder / "x").exists()


def test_a_sweeps_value_with_a_line_break() -> None:
    with pytest.raises(UserError, match=r"^name: its value has a line break"):
        pick(1, ["seed=1,2", "name='a\nb'"])


class Malicious:
    """Leaves a file where it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


@pytest.mark.parametrize("of", ["model", "adapter"])
def test_no_pickle_is_executed(
    sft: Sft, model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, of: str
) -> None:
    """Weights in a pickle that does something are refused in one line, without being done."""
    trace, folder = tmp_path / "executed", tmp_path / "weights"
    if of == "model":
        shutil.copytree(model_folder, folder)
        (folder / "model.safetensors").unlink()
        torch.save({"model.norm.weight": Malicious(trace)}, folder / "pytorch_model.bin")
        options = [*sft.settings, f"model.path={folder}"]
    else:
        folder.mkdir()
        target = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        (folder / "adapter_config.json").write_text(
            json.dumps({**target, "base_model_name_or_path": str(model_folder)})
        )
        torch.save({"base_model.model.model.q": Malicious(trace)}, folder / "adapter_model.bin")
        options = [*sft.settings, "adapter=lora", f"model.path={folder}"]
    assert sft("train", *options, "run=r") == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("sft: ") and "Traceback" not in said
    assert not trace.exists()
    print(said)
