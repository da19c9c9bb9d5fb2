"""Norms of weights and updates by groups of layers, against plain torch on the weights that checkpoints hold."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MambaConfig, MambaForCausalLM

import settings
from conftest import tiny_llama
from runfiles import rows
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.training import layers
from sft.training.layers import Layers, by_depth

SETTINGS = ("data.val_size=0", "export=false", "checkpoint.save_every=1", "checkpoint.keep_last=9", "max_steps=6")


def test_groups_are_by_depth() -> None:
    groups = list(dict.fromkeys(by_depth(tiny_llama(num_hidden_layers=10, tie_word_embeddings=False)).values()))
    assert groups == ["embeddings", "layers.0-1", "layers.2-4", "layers.5-7", "layers.8-9", "rest", "head"]
    tied = by_depth(tiny_llama())
    assert tied["model.embed_tokens.weight"] == "embeddings" and tied["model.norm.weight"] == "rest"
    assert tied["model.layers.1.input_layernorm.weight"] == "layers.1"
    # Its class names a part of a layer, too, as what isn't to be split.
    state_space = MambaForCausalLM(MambaConfig(vocab_size=264, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert set(by_depth(state_space).values()) == {"embeddings", "layers.0", "layers.1", "rest"}
    adapted = tiny_llama()
    settings.adapter().add(adapted)
    assert set(by_depth(adapted).values()) == {"layers.0", "layers.1"}


def test_a_group_is_measured_in_a_step_of_its_own() -> None:
    measured = Layers(4)
    measured.group_of = {"a": "embeddings", "b": "layers.0", "c": "layers.0", "d": "rest"}
    assert [measured.due(step) for step in range(1, 7)] == [
        ["embeddings"], ["layers.0"], ["rest"], [], ["embeddings"], ["layers.0"]
    ]  # fmt: skip
    measured.every = 2
    assert measured.due(1) == measured.due(3) == ["embeddings", "rest"]
    measured.every = 0
    assert not measured.due(1)


def norm(tensors: list[Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())


def test_norms_are_those_of_the_weights_of_two_steps(sft: Sft) -> None:
    assert sft.train("run=run", *SETTINGS, "evaluation.layers_every=4") == 0
    before = load_file(Path(sft.settings[0].removeprefix("model.path=")) / "model.safetensors")
    group_of, seen = by_depth(tiny_llama()), []
    for row, checkpoint in zip(rows(sft.run_folder()), complete(sft.run_folder() / "checkpoints"), strict=True):
        after = {name: checkpoint.tensor(name) for name in checkpoint.shapes}
        for column in [column for column in row if column.startswith("train/weight_norm/") and row[column]]:
            group = column.removeprefix("train/weight_norm/")
            names = [name for name in after if group_of[name] == group]
            weight, update = norm([after[n] for n in names]), norm([after[n] - before[n] for n in names])
            assert float(row[column]) == pytest.approx(weight, rel=1e-6)
            assert float(row[f"train/update_ratio/{group}"]) == pytest.approx(update / weight, rel=1e-6)
            seen.append((row["step"], group))
        before = after
    groups = ["embeddings", "layers.0", "layers.1", "rest"]
    assert seen == list(zip("123456", [*groups, *groups[:2]], strict=True))


def test_without_the_memory_they_are_not_measured(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Short:
        name = "model.embed_tokens.weight"

        @property
        def weight(self) -> Tensor:
            raise torch.OutOfMemoryError

    short = SimpleNamespace(replicated=False, parts=lambda: [Short()])
    monkeypatch.setattr(layers, "layout", lambda trainer, module: short)
    assert sft.train("run=run", *SETTINGS, "max_steps=2") == 0
    assert "weight_norm" not in (sft.run_folder() / "metrics.csv").read_text()
    assert capsys.readouterr().out.count("layers: a rank lacks the memory to measure them") == 1
