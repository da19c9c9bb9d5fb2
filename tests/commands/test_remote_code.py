"""A model whose code is in its folder: trained, exported with its code, and refused without leave to run it."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_llama
from running import Sft

CONFIGURATION = """
from transformers import LlamaConfig


class DoubledConfig(LlamaConfig):
    model_type = "doubled"
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_doubled import DoubledConfig


class DoubledForCausalLM(LlamaForCausalLM):
    config_class = DoubledConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2  # what no class of transformers does
        return output
"""


@pytest.fixture
def own_code(model_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "doubled"
    tiny_llama().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((model_folder / name).read_bytes())
    (folder / "configuration_doubled.py").write_text(CONFIGURATION)
    (folder / "modeling_doubled.py").write_text(MODEL)
    settings = json.loads((folder / "config.json").read_text()) | {
        "model_type": "doubled",
        "architectures": ["DoubledForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_doubled.DoubledConfig",
            "AutoModelForCausalLM": "modeling_doubled.DoubledForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_code_of_its_own(
    sft: Sft, own_code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(sft.folder / "modules"))
    assert sft.train(f"model.path={own_code}", "name=run") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"sft: the model {own_code} can't be loaded: its folder holds Python code of its own, which is run to load it: "
        "read it, then set model.trust_remote_code=true"
    )
    options = [f"model.path={own_code}", "model.trust_remote_code=true", "name=run", "max_steps=2"]
    assert sft.train(*options) == 0
    export = next(sft.folder.glob("runs/run*/export"))
    assert json.loads((export / "verified.json").read_text())["equal"]
    for name in ("configuration_doubled.py", "modeling_doubled.py"):
        assert (export / name).read_text() == (own_code / name).read_text()
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        doubled, plain = model(ids).logits, model.lm_head(model.model(ids).last_hidden_state)
    assert torch.equal(doubled, 2 * plain)
    capsys.readouterr()
    assert sft("generate", f"run={export.parent}", "--prompt", "Reverse abc.", "max_new_tokens=3") == 0
