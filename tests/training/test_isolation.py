"""Runs whose samples run apart train and measure what packed ones do, also on ranks that gather weights as they go."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from runfiles import rows, weights
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.training.datamodule import SFTDataModule

# Packs of one to five samples, of which ranks have unequally many; the last step leaves a rank without any.
COMMON = (
    *("optimizer=sgd", "optimizer.lr=0.3", "max_steps=3", "val_every=2", "export=false", "micro_batch_size=1"),
    *("evaluation.kl_tokens=20", "evaluation.text=text.txt", "loss.label_smoothing=0.1", "loss.z_loss=0.01"),
    *("model.neftune_alpha=10", "model.config.attention_dropout=0.2", "data.max_length=200", "checkpoint.save_every=3"),
)
APART = ("model.isolate=apart", "model.gradient_checkpointing=true")


def text(sft: Sft) -> None:
    (sft.folder / "text.txt").write_text("A line.\n\nAnother line, which is longer.\n\nAnd a third.\n")


def assert_same(sft: Sft, run: str, other: str) -> None:
    of_one, of_other = rows(sft.run_folder(run)), rows(sft.run_folder(other))
    names = [name for name in of_one[0] if name.startswith(("train/", "val/"))]
    assert {"val/kl_base", "val/general_loss", "val/accuracy", "train/z_loss", "train/grad_norm"} <= set(names)
    for one, two in zip(of_one, of_other, strict=True):
        for name in names:
            assert bool(one[name]) == bool(two[name])
            if one[name] and "seconds" not in name and "per_second" not in name:
                assert float(one[name]) == pytest.approx(float(two[name]), rel=3e-5, abs=2e-6), (one["step"], name)
    expected = weights(sft.run_folder(other))
    for name, tensor in weights(sft.run_folder(run)).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=3e-6, msg=name)
    before, again = (load_file(sft.run_folder(name) / "base.safetensors") for name in (run, other))
    for name, tensor in before.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-5, atol=1e-5, msg=name)


def test_apart_is_packed(sft: Sft) -> None:
    text(sft)
    adapter = ("adapter=lora", "adapter.dropout=0.3")
    assert sft.train("run=packed", *COMMON, *adapter, "model.isolate=packed") == 0
    assert sft.train("run=apart", *COMMON, *adapter, *APART) == 0
    assert_same(sft, "apart", "packed")
    probes = [
        json.loads((complete(sft.run_folder(run) / "checkpoints")[-1].path / "probes.json").read_text())
        for run in ("apart", "packed")
    ]
    for one, other in zip(*probes, strict=True):
        assert one["log_probs"] == pytest.approx(other["log_probs"], abs=1e-4)


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_ranks_that_gather_weights_stay_in_step(strategy: str, sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    text(sft)
    unequal: list[Any] = []
    original = SFTDataModule._training

    def noted(self: SFTDataModule) -> Any:
        for batch in original(self):
            unequal.append(len(batch["counts"]))
            yield batch

    monkeypatch.setattr(SFTDataModule, "_training", noted)
    assert sft.train("run=one", *COMMON, "model.isolate=packed") == 0
    assert len(set(unequal)) > 1
    settings = (*sft.settings, *COMMON, *APART, f"strategy={strategy}", "run=two")
    ended = sft.ranks(2, "train", *settings)
    assert ended.code == 0, ended.output
    assert_same(sft, "two", "one")
