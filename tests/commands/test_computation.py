"""A run resumes with the computation that it began with, or says what has changed, or is refused."""

import os
import shutil
import signal
from pathlib import Path

from running import Ended, Sft
from sft.runs import computation, events

ROW = """
from my_words import word
from sft.data.conversation import prompt_response

def row(row, **settings):
    name = settings["prompt"]
    return prompt_response({**row, name: word + row[name]}, **settings)
"""
CALLBACK = "from lightning.pytorch.callbacks import Callback\n\nclass Mine(Callback):\n    pass\n"
KILLED = "+callbacks.kill={_target_: mishaps.Mishap, step: 4, rank: null, what: kill}"
SETTINGS = (
    *("run=run", "max_steps=6", "val_every=2", "data=prompt_response", "evaluation.kl_tokens=0"),
    *("data.conversation._target_=my_rows.row", "+callbacks.own._target_=my_callback.Mine"),
)


def test_a_change_of_the_users_code_between_two_starts(sft: Sft) -> None:
    """Of a helper of the row function, which is refused, and of a callback, which is said."""

    def write(name: str, text: str) -> None:
        (sft.folder / f"{name}.py").write_text(text)
        shutil.rmtree(sft.folder / "__pycache__", ignore_errors=True)  # of the same second and size

    def run(command: str, *more: str) -> Ended:
        return sft.process(command, *([*sft.settings, *SETTINGS] if command == "train" else ["run=run"]), *more)

    write("my_rows", ROW)
    write("my_words", "word = 'a '\n")
    write("my_callback", CALLBACK)
    killed = run("train", KILLED)
    assert killed.code == -signal.SIGKILL, killed.output
    write("my_words", "word = 'b '\n")
    write("my_callback", CALLBACK + "\n")
    stores = sorted((sft.folder / "cache").glob("**/meta.json"))

    refused = run("train")
    assert refused.code == 2
    assert "runs/run computes would change after step 2: my_words.py changed: put back what was there" in refused.output
    assert "resume.allow=[code]" in refused.output
    assert sorted((sft.folder / "cache").glob("**/meta.json")) == stores  # nothing was built with the other code
    assert [event["event"] for event in events.read(sft.run_folder())].count("start") == 1

    allowed = run("train", "resume.allow=[code]")
    assert allowed.code == 0, allowed.output
    said = "my_words.py changed; my_callback.py changed"
    assert f"since step 2: {said}" in allowed.output
    first, second = (event for event in events.read(sft.run_folder()) if event["event"] == "start")
    assert (second["changed"], second["allowed"]) == (said, ["code"])
    assert first["computation"] != second["computation"]
    assert first["code"]["files"]["own data.conversation"].keys() == {"my_rows.py", "my_words.py"}
    assert {"torch", "transformers", "python"} <= first["code"]["versions"].keys()
    proof = next(event for event in events.read(sft.run_folder()) if event["event"] == "first_batch")
    assert "attention" in proof
    card = (sft.run_folder() / "export/README.md").read_text()
    assert f"| changed | since step 2: {said} |" in card
    assert said in (sft.run_folder() / "report.html").read_text()

    quiet = run("generate", "prompt=hi", "max_new_tokens=1")
    assert quiet.code == 0, quiet.output
    assert "note:" not in quiet.output
    write("my_words", "word = 'c '\n")
    noted = run("generate", "prompt=hi", "max_new_tokens=1")
    assert noted.code == 0, noted.output
    assert "note: my_words.py changed since" in noted.output


def other_code() -> None:
    """On the second rank, as of another copy of the project on its node."""
    if os.environ["RANK"] == "1":
        before = computation._hash
        computation._hash = lambda file: "other" if file.name == "loss.py" else before(file)


def other_version() -> None:
    if os.environ["RANK"] == "1":
        before = computation.provenance.installed
        computation.provenance.installed = lambda package: "0.1" if package == "numpy" else before(package)


def test_ranks_with_different_code_do_not_train_together(sft: Sft) -> None:
    settings = (*sft.settings, "run=run", "max_steps=2", "export=false", "strategy=ddp")
    refused = sft.ranks(2, "train", *settings, before=other_code)
    assert refused.code == 2
    assert "sft: the code differs between the ranks on " in refused.output
    assert ": model/loss.py changed: put the same code on each node" in refused.output
    assert not list(Path("runs").glob("*/checkpoints/*"))
    noted = sft.ranks(2, "train", *settings, before=other_version)
    assert noted.code == 0, noted.output
    assert noted.output.count("note: versions differ between the ranks on ") == 1
    assert "→ 0.1" in noted.output
