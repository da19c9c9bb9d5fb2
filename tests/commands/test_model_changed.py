"""A run whose model, tokenizer or template has changed is not resumed, exported or asked in silence."""

import shutil
from pathlib import Path

import pytest
import torch

from conftest import CHATML as TEMPLATE
from conftest import tiny_llama
from runfiles import change
from running import Sft


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_folder, tmp_path / "model")
    return tmp_path / "model"


def other_weights(model: Path) -> None:
    torch.manual_seed(9)
    tiny_llama().save_pretrained(model)


def refusal(sft: Sft, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert sft(*arguments) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_s_base(sft: Sft, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("run=run", f"model.path={model}", "adapter=lora", "adapter.merge=false", "max_steps=1")
    assert sft.train(*settings) == 0
    other_weights(model)
    line = (
        f"sft: the weights in {model} have changed since runs/run began (model.safetensors): put back what was there, "
        "or start another run with run=NAME"
    )
    assert refusal(sft, capsys, "generate", "run=run", "--prompt", "a") == line
    assert refusal(sft, capsys, "score", "run=run") == line
    assert refusal(sft, capsys, "export", "run=run", "output=again") == line
    shutil.rmtree(sft.run_folder() / "export")
    status = sft.run_folder() / "status.json"
    change(status, state="interrupted")
    assert refusal(sft, capsys, "train", *sft.settings, *settings) == line
    # A run that was begun before there were fingerprints isn't checked.
    file = sft.run_folder() / "provenance.json"
    change(file, model=None)
    assert sft("export", "run=run", "output=again") == 2  # no longer the model that was trained
    assert "is not the model that was trained" in capsys.readouterr().err


def test_full_fine_tuning_needs_tokenizer_and_template_and_not_the_base_weights(
    sft: Sft, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = sft.folder / "template.jinja"
    template.write_text(TEMPLATE)
    settings = ("run=run", f"model.path={model}", "export=false", f"model.chat_template={template}", "epochs=1")
    assert sft.train(*settings) == 0
    status = sft.run_folder() / "status.json"
    change(status, state="interrupted")
    other_weights(model)
    assert sft.train(*settings) == 0
    assert sft("export", "run=run") == 0
    change(status, state="interrupted")
    template.write_text(TEMPLATE + "{# another #}")
    assert refusal(sft, capsys, "train", *sft.settings, *settings) == (
        "sft: the chat template has changed since runs/run began: put back what was there, or start another run with "
        "run=NAME"
    )
