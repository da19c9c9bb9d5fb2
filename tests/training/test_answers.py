"""Answers while a run trains: training doesn't notice them, they are those of its weights, and nothing about them ends
a run."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from runfiles import final_files, rows
from running import Sft

ON = ("evaluation.samples=4", "evaluation.max_new_tokens=12", "evaluation.seconds=200")
SETTINGS = ("epochs=2", "val_every=2", "checkpoint.save_every=4", "export=false")
NOISE = ("model.neftune_alpha=5", "model.config.attention_dropout=0.1")
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def without_answers(folder: Path) -> list[dict[str, str]]:
    return [{name: value for name, value in row.items() if "answers/" not in name} for row in rows(folder)]


@pytest.fixture
def windows(sft: Sft, model_folder: Path) -> str:
    """The setting that names a Mistral whose attention looks 16 tokens back."""
    folder = sft.folder / "windows"
    shutil.copytree(model_folder, folder)
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SIZES, sliding_window=16)).save_pretrained(folder)
    return f"model.path={folder}"


@pytest.mark.parametrize("settings", [NOISE, ("adapter=lora", *NOISE)], ids=["all weights", "lora"])
def test_training_does_not_notice_them(sft: Sft, windows: str, settings: tuple[str, ...]) -> None:
    for name, asked in {"off": (), "on": ON}.items():
        assert sft.train(f"run={name}", *SETTINGS, windows, *settings, *asked) == 0
    off, on = sft.run_folder("off"), sft.run_folder("on")
    assert without_answers(on) == rows(off)
    assert final_files(on) == final_files(off)
    assert [row["step"] for row in rows(on) if row["answers/score"]] == ["0", "2", "4", "6"]
    assert not (off / "samples.jsonl").exists()
