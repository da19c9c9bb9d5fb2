"""The first things that a person types, each in a process that has no torch: what is answered without it is answered at
once."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from textwrap import dedent

import pytest
from hydra import compose, initialize_config_dir

from running import Sft
from sft.config import CONF

# Runs command lines, each in a folder of its own, and prints the code, the output and the errors of each.
WITHOUT_TORCH = dedent("""
    import contextlib, io, json, os, sys
    sys.modules["torch"] = None  # its import fails
    from sft import cli
    answers = []
    for folder, line in json.load(sys.stdin):
        os.chdir(folder)
        sys.argv, code = ["sft", *line], 0
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                cli.main()
            except SystemExit as end:
                code = end.code
        answers.append((code, out.getvalue(), err.getvalue()))
    json.dump(answers, sys.stdout)
""")


def nothing(folder: Path) -> None:
    pass


def bert(folder: Path) -> None:
    (folder / "model" / "config.json").write_text('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}')


def no_weights(folder: Path) -> None:
    (folder / "model" / "model.safetensors").unlink()


HERE = ["model.path=model", "data.path=rows.jsonl"]
ROWS = [
    (nothing, ["train"], "no model is named: set model.path to a folder or a Hub name, e.g. Qwen/Qwen3-0.6B"),
    (nothing, ["train", "model.path=model"], "no data is named: set data.path to a file, a folder or a Hub data set"),
    (nothing, ["trian"], "there is no command trian: did you mean train?"),
    (nothing, ["seed=1"], "the command is missing: sft train seed=1"),
    (nothing, ["train", "epochs=0"], "epochs=0 is not a number above 0"),
    (nothing, ["train", "trainer.max_epochs=2"], "there is no setting trainer.max_epochs; in its place: epochs"),
    (nothing, ["train", "experiment=x"], "there is no experiment=x: choose demo, demo_base, gsm8k"),
    (nothing, ["train", "--config-dir", "none"], "Additional config directory '{folder}/none' not found"),
    (
        nothing,
        ["train", "--config-dir", "mine", "experiment=x"],
        "there is no experiment=x: choose demo, demo_base, gsm8k, own",
    ),
    (
        nothing,
        ["train", *HERE, "data.path=~none/x.jsonl"],
        "data.path=~none/x.jsonl: there is no user none",
    ),
    (nothing, ["train", *HERE, "data.path=none.jsonl"], "none.jsonl: no such file or folder (looked in {folder})"),
    (nothing, ["train", *HERE, "model.path=./none"], "model.path=./none: there is no such folder (looked in {folder})"),
    (
        nothing,
        ["train", *HERE, "model.path=runs/done"],
        "model.path=runs/done is a run's folder: set model.path=runs/done/export",
    ),
    (
        nothing,
        ["train", *HERE, "model.chat_template=x.jinja"],
        "model.chat_template=x.jinja: there is no such file (looked in {folder})",
    ),
    (
        bert,
        ["train", *HERE],
        "model.path=model is a BertForMaskedLM, no causal language model: choose a model whose config.json names one, "
        "such as LlamaForCausalLM",
    ),
    (no_weights, ["train", *HERE], "model.path=model: the folder holds no weights (model.safetensors)"),
    (
        nothing,
        ["train", *HERE, "runs_dir=rows.jsonl/runs", "run=a"],
        "rows.jsonl/runs/a can't be written ({folder}/rows.jsonl: Not a directory): set runs_dir to another folder",
    ),
    (
        nothing,
        ["train", *HERE, "runs_dir=/proc/runs", "run=a"],
        "/proc/runs/a can't be written (/proc: No such file or directory): set runs_dir to another folder",
    ),
    (
        nothing,
        ["train", *HERE, "optimizer._target_=mycode.Nope"],
        "optimizer._target_=mycode.Nope is not found (No module named 'mycode'): looked in the installed packages, "
        "{folder} and {folder}/src",
    ),
    (
        nothing,
        ["train", *HERE, "+callbacks.a._target_=own_code.Nope"],
        "callbacks.a._target_=own_code.Nope is not found (No module named 'own_code.Nope'; 'own_code' is not a "
        "package): looked in the installed packages, {folder} and {folder}/src",
    ),
    (
        nothing,
        ["train", *HERE, "trainer.devices=2"],
        "strategy=single is for one device, and the trainer has 2: set strategy=ddp",
    ),
    (nothing, ["generate", "none"], "there is no run none: runs/ holds done (looked in {folder})"),
    (nothing, ["score", "run=none"], "there is no run none: runs/ holds done (looked in {folder})"),
    (
        nothing,
        ["generate", "done"],
        "runs/done has no exported model: let sft train finish, or sft export run=done",
    ),
    (nothing, ["export"], "run must be given: see sft export --help"),
    (nothing, ["export", "done"], "runs/done has no checkpoint yet: let sft train continue"),
    (nothing, ["generate", "done", "max_new_tokens=0"], "max_new_tokens=0 is not a whole number from 1 on"),
    (nothing, ["compare", "none"], "there is no run none: runs/ holds done (looked in {folder})"),
    (nothing, ["runs", "none"], "there is no run none: runs/ holds done (looked in {folder})"),
    (nothing, ["watch", "none"], "there is no run none: runs/ holds done (looked in {folder})"),
    (nothing, ["watch", "runs_dir=none"], "there are no runs in none: set runs_dir="),
    (
        nothing,
        ["runs", "state=ready"],
        "state=ready is not one of running, queued, starting, interrupted, failed, died, silent, finished, new, "
        "unreadable (or null)",
    ),
    (nothing, ["preview", *HERE, "data.path=none.jsonl"], "none.jsonl: no such file or folder (looked in {folder})"),
]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path
) -> list[tuple[Path, tuple[int, str, str]]]:
    """The folder and the answer of each row."""
    lines = []
    for prepare, line, _ in ROWS:
        folder = tmp_path_factory.mktemp("here")
        shutil.copytree(model_folder, folder / "model")
        shutil.copy(data_file, folder / "rows.jsonl")
        (folder / "runs" / "done" / "checkpoints").mkdir(parents=True)
        (folder / "runs" / "done" / "config.yaml").write_text("{}")
        (folder / "mine" / "experiment").mkdir(parents=True)
        (folder / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nname: own\n")
        (folder / "src").mkdir()
        (folder / "src" / "own_code.py").write_text("")
        prepare(folder)
        lines.append((str(folder), line))
    command = [sys.executable, "-c", WITHOUT_TORCH]
    ended = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    return [(Path(folder), answer) for (folder, _), answer in zip(lines, json.loads(ended.stdout), strict=True)]


@pytest.mark.xdist_group("front door")
@pytest.mark.parametrize("row", range(len(ROWS)), ids=lambda row: " ".join(ROWS[row][1]))
def test_a_mistake_is_answered_in_a_line_before_torch_is_imported(
    row: int, answers: list[tuple[Path, tuple[int, str, str]]]
) -> None:
    folder, (code, out, err) = answers[row]
    assert err == f"sft: {ROWS[row][2].format(folder=folder)}\n"
    assert (code, out) == (2, "")


def run(*command: str | Path, **options: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_the_command_by_its_other_names() -> None:
    for command in (["-m", "sft"], ["-m", "sft.cli"]):
        assert run(sys.executable, *command, "--version").stdout == f"sft {version('sft')}\n"
    assert "sft COMMAND [setting=value ...]" in run(sys.executable, "-m", "sft").stdout


@pytest.mark.parametrize("line", [["train", "help"], ["train", "-h"], ["train", "seed=1", "--help"], ["help", "train"]])
def test_help(line: list[str], sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft(*line) == 0
    assert capsys.readouterr().out.startswith("sft train: fine-tune a model on prompts and responses.")


COMPLETIONS = {
    "sft ": "certify check compare export generate preview rehearse runs score submit train watch",
    "sft train optimizer.l": "optimizer.lr=",
    "sft train schedule=c": "schedule=constant schedule=cosine",
    "sft generate max_": "max_new_tokens=",
    "sft watch on": "once=",
}


def test_completion() -> None:
    """As bash asks for it, of the function that `eval "$(sft -sc install=bash)"` defines."""
    script = f"""
        PATH={Path(sys.executable).parent}:$PATH
        eval "$(sft -sc install=bash)"
        ask() {{
            COMP_LINE=$1 COMP_POINT=${{#1}} COMP_WORDS=($1) COMP_CWORD=$2
            hydra_bash_completion
            echo "${{COMPREPLY[@]}}"
        }}
    """
    for line in COMPLETIONS:
        script += f"ask '{line}' {len(line.split()) - (line[-1] != ' ')}\n"
    ended = run("bash", "-c", dedent(script))
    assert ended.stderr == ""
    assert [" ".join(sorted(line.split())) for line in ended.stdout.splitlines()] == list(COMPLETIONS.values())


def test_what_a_project_keeps_apart(sft: Sft, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Own configuration, rows, callback and model in a folder of one's own, found without PYTHONPATH."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "kept_apart.py").write_text(
        dedent("""
        from lightning.pytorch.callbacks import Callback
        from sft.data.conversation import Conversation

        def rows(row, *, shout):
            return Conversation(prompt=row["prompt"], response=row["response"].upper() if shout else row["response"])

        class Says(Callback):
            def __init__(self, word):
                self.word = word
            def on_fit_end(self, trainer, module):
                print(self.word, trainer.global_step)
    """)
    )
    for group, text in (
        (
            "experiment",
            "# @package _global_\nname: mine\nmax_steps: 2\n"
            "defaults: [override /data: rows, override /callbacks: says]\n",
        ),
        ("data", "defaults: [base]\nconversation: {_target_: kept_apart.rows, _partial_: true, shout: true}\n"),
        ("callbacks", "says: {_target_: kept_apart.Says, word: ended after}\n"),
    ):
        (tmp_path / "mine" / group).mkdir(parents=True)
        name = {"experiment": "mine", "data": "rows", "callbacks": "says"}[group]
        (tmp_path / "mine" / group / f"{name}.yaml").write_text(text)
    assert sft.train("--config-dir", "mine", "experiment=mine", "export=false", "data.conversation.shout=true") == 0
    assert "ended after 2\n" in capsys.readouterr().out
    assert [path.name[:5] for path in (tmp_path / "runs").iterdir()] == ["mine-"]


def test_settings_of_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """conf/local/default.yaml, which git ignores."""
    shutil.copytree(CONF, tmp_path / "conf")
    (tmp_path / "conf" / "local").mkdir()
    (tmp_path / "conf" / "local" / "default.yaml").write_text("# @package _global_\nruns_dir: /scratch/runs\n")
    with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"):
        assert compose("train").runs_dir == "/scratch/runs"
        assert compose("train", ["runs_dir=here"]).runs_dir == "here"
    assert "/conf/local/" in (CONF.parent / ".gitignore").read_text().split()


def test_settings_of_a_job_array_are_taken_as_typed(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("job", "setting", "1", "data.path=data(1).jsonl", "seed=1,2") == 0
    assert capsys.readouterr().out.splitlines() == ['data.path="data(1).jsonl"', "seed=2"]


def test_a_group_that_is_left_out_is_empty(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("max_steps=1", "export=false") == 0
    assert sft.train("max_steps=1", "export=false", "~adapter", "~strategy", "~callbacks", "~logger") == 0
    assert "is finished: nothing to do" in capsys.readouterr().out  # the same run
    assert sft.train("run=other", "max_steps=1", "export=false", "~adapter", "~strategy", "~callbacks", "~logger") == 0
