"""A model read range by range is the one that transformers reads."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import settings
from conftest import tiny_llama
from made_up import OneRank
from sft.model import sharded_loading


def streamed(folder: Path) -> Any:
    return settings.model_source(path=str(folder), attention="sdpa").load(torch.float32, sharding=OneRank())


def assert_equal(model: Any, folder: Path) -> None:
    expected = type(model).from_pretrained(folder, dtype=torch.float32)
    for ours, theirs in (
        (model.named_parameters(), expected.named_parameters()),
        (model.named_buffers(), expected.named_buffers()),
    ):
        ours, theirs = dict(ours), dict(theirs)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
def test_one_file_or_many(tmp_path: Path, tied: bool, shard_size: str) -> None:
    tiny_llama(tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_size == "20KB"
    assert_equal(streamed(tmp_path), tmp_path)


def test_a_file_of_the_bare_backbone(tmp_path: Path) -> None:
    model = tiny_llama()
    model.model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "embed_tokens.weight" in load_file(tmp_path / "model.safetensors")
    assert_equal(streamed(tmp_path), tmp_path)


def test_weights_that_are_stored_otherwise_are_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert sharded_loading.weight_reader(str(tmp_path), None, shapes, "model") is not None
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.scale"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    assert sharded_loading.weight_reader(str(tmp_path), None, shapes, "model") is None
    assert sharded_loading.weight_reader(str(tmp_path), None, {"model.embed_tokens.weight": [32, 264]}, "model") is None
    tensors["model.norm.weight"] = tensors.pop("model.norm.scale")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(sharded_loading, "weight_reader", lambda *_: None)
    assert_equal(streamed(tmp_path), tmp_path)


@pytest.mark.parametrize("by_range", [True, False])
def test_first_values_outlive_the_rounding(tmp_path: Path, by_range: bool) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = tiny_llama().from_pretrained(tmp_path, dtype=torch.float32)
    values = sharded_loading.first_values(model, str(tmp_path) if by_range else None, None)
    model.bfloat16()
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(values(name, 3, 17), weight.flatten()[3:17])
