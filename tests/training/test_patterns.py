"""Patterns of parameters' names in a run: what is frozen stays as it was, is saved nowhere, and is in the export."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runfiles import last_checkpoint, weights
from running import Sft

FROZEN = "parameters.freeze=['*.layers.0.*','*embed*']"
GROUPS = "parameters.groups=[{match: '*.layers.1.mlp.*', lr: 1e-4, weight_decay: 0.5}]"


def test_frozen_weights_are_in_the_export_alone(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    base = load_file(Path(sft.settings[0].removeprefix("model.path=")) / "model.safetensors")
    assert sft.train("run=run", FROZEN, GROUPS, "data.val_size=0", "max_steps=2", "checkpoint.save_every=1") == 0
    printed = capsys.readouterr().out
    assert "optimizer: *.layers.1.mlp.*: lr 0.0001, weight decay 0.5, 6,144 parameters" in printed
    trained = weights(sft.run_folder())
    assert trained.keys() == {name for name in base if ".layers.0." not in name and "embed" not in name}
    saved = {key[0] for key in last_checkpoint(sft.run_folder())._pieces}
    assert saved == trained.keys()
    exported = load_file(sft.run_folder() / "export" / "model.safetensors")
    assert exported.keys() == base.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained.get(name, base[name])), name
        assert (name in trained) is not torch.equal(tensor, base[name]), name
    # The group's rate is a hundredth of the others', which AdamW's first steps show.
    moved = {name: (tensor - base[name]).abs().max().item() for name, tensor in trained.items()}
    assert moved["model.layers.1.mlp.up_proj.weight"] < 4e-4 < 4e-3 < moved["model.layers.1.self_attn.q_proj.weight"]


def test_resumed_with_frozen_weights(sft: Sft) -> None:
    settings = (FROZEN, GROUPS, "data.val_size=0", "max_steps=3", "checkpoint.save_every=1", "export=false")
    assert sft.train("run=whole", *settings) == 0
    stop = "+callbacks.stop={_target_: mishaps.Mishap, step: 2, rank: null, what: raise}"
    assert sft.train("run=run", *settings, stop) != 0
    assert sft.train("run=run", *settings) == 0
    whole = weights(sft.run_folder("whole"))
    for name, tensor in weights(sft.run_folder()).items():
        assert torch.equal(tensor, whole[name]), name


def test_a_pattern_without_a_match_is_refused_before_the_data_are_read(
    sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = "parameters.groups=[{match: '*lora_C*', lr: 1e-3}]"
    assert sft.train("run=run", groups, "adapter=lora") == 2
    printed = capsys.readouterr()
    assert "parameters.groups[0].match: *lora_C* matches no parameter that is trained; near it are " in printed.err
    assert "token store" not in printed.out


def test_freezing_beside_an_adapter_is_refused(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", FROZEN, "adapter=lora") == 2
    assert (
        "parameters.train and parameters.freeze: beside an adapter the whole model is frozen: choose the layers that "
        "it adapts with adapter.target_modules" in capsys.readouterr().err
    )
