"""docs/how-it-works.md prints the way from the command to the cross-entropy as it is."""

import csv
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import sft as package
from pages import DOCS, PAGES
from running import Sft
from sft.model import loss

ROOT = Path(__file__).resolve().parents[1]
SOURCE = Path(package.__file__ or "").parent


def way(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """File and function of each of the project's calls from the command to the loss of a step."""
    ways, original = [], loss._LinearNLL

    class Seen(original):
        @staticmethod
        def forward(*arguments: object) -> object:
            frames = [frame for frame in inspect.stack()[1:] if frame.filename.startswith(str(SOURCE))]
            calls = [(str(Path(frame.filename).relative_to(SOURCE)), frame.function) for frame in reversed(frames)]
            ways.append([*calls[calls.index(("commands/train.py", "main")) :], ("model/loss.py", "forward")])
            return original.forward(*arguments)

    monkeypatch.setattr(loss, "_LinearNLL", Seen)
    assert sft.train("run=run", "max_steps=1", "data.val_size=0", "export=false") == 0
    return ways[0]


def test_way_to_the_cross_entropy(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = way(sft, monkeypatch)
    files = list(dict.fromkeys(file for file, _ in calls))
    assert len(files) <= 4
    assert len(calls) - 1 <= 6  # the command itself is where it begins
    functions = {file: ", ".join(f"`{function}`" for other, function in calls if other == file) for file in files}
    rows = []
    for file in files:
        num_lines = round(len((SOURCE / file).read_text().splitlines()), -1)
        rows.append(f"| [`{file}`](../src/sft/{file}) | {num_lines} | {functions[file]} |")
    table = "\n".join(["| file | lines | calls |", "|---|---|---|", *rows])
    assert table in (ROOT / "docs" / "how-it-works.md").read_text(), f"docs/how-it-works.md should print\n\n{table}"


def test_notebook(sft: Sft, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (page,) = (PAGES[path] for path in DOCS if path.name == "how-it-works.md")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(code[code.index("with ") :].splitlines()) <= 10
    code = code.replace("Qwen/Qwen3-0.6B", str(model_folder)).replace("my.jsonl", str(data_file))
    code = code.replace('"global_batch_size=4"', '"global_batch_size=4", "data.max_length=256", "epochs=1"')
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's hints to a notebook
        exec(code, names)
    assert names["trainer"].global_step == names["made"].data.num_steps == 3
    # The same numbers as those of the command.
    assert sft.train("epochs=1", "run=run", "optimizer.lr=2e-5", "trainer.gradient_clip_val=null", "export=false") == 0
    with (sft.run_folder() / "metrics.csv").open() as file:
        *_, last = csv.DictReader(file)
    assert float(names["module"].val_loss) == pytest.approx(float(last["val/loss"]), abs=1e-6)
