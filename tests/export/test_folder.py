"""The Hugging Face folder of a model that is read one weight at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import settings
from made_up import SIZE, Weights
from sft.errors import UserError
from sft.export.folder import generation_config, write_model
from sft.model.loading import ModelSource

KINDS = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "other names on disk": {"model_type": "gpt_neox"},
    "experts joined in memory": {"model_type": "mixtral", "num_local_experts": 4},
}


def model_of(kind: str) -> tuple[ModelSource, Any]:
    source = settings.model_source(init="random", tokenizer="unused", config=SIZE | KINDS[kind], attention="eager")
    torch.manual_seed(0)
    return source, source.load(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    source, model = model_of(kind)
    weights, lines = Weights(model), []
    write_model(
        tmp_path / "ours",
        source,
        weights.layout,
        weights.read,
        GenerationConfig(),
        max_shard_size=40_000,
        log=lines.append,
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size=40_000)

    ours, theirs = (
        {path.name: load_file(path) for path in (tmp_path / each).glob("*.safetensors")} for each in ("ours", "theirs")
    )
    assert len(ours) > 2
    assert {file: tensors.keys() for file, tensors in ours.items()} == {
        file: tensors.keys() for file, tensors in theirs.items()
    }
    for file, tensors in theirs.items():
        assert all(torch.equal(ours[file][name], tensor) for name, tensor in tensors.items())
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )
    # Only what transformers splits or joins is held all at once, and is said to be.
    whole = sum(tensor.nbytes for tensor in weights.tensors.values())
    assert [len(lines), weights.most_held] == (
        [1, whole] if kind.startswith("experts") else [0, SIZE["vocab_size"] * 128]
    )


def test_reloads_in_another_dtype(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source, model = model_of("tied")
    weights = Weights(model)
    generation = generation_config(source, tokenizer, [258])
    write_model(tmp_path, source, weights.layout, weights.read, generation, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert reloaded.generation_config.eos_token_id == [258]
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, weights.tensors[name].bfloat16())


def test_a_size_that_is_none(tmp_path: Path) -> None:
    source, model = model_of("tied")
    weights = Weights(model)
    with pytest.raises(UserError, match="max_shard_size=big is no size"):
        write_model(tmp_path, source, weights.layout, weights.read, GenerationConfig(), max_shard_size="big")
