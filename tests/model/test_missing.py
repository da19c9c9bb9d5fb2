"""Weights that a model's files lack are refused by name before anything is trained, or drawn as the settings say."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import settings
from conftest import tiny_llama
from made_up import SIZE, OneRank
from sft.errors import UserError

Tensors = dict[str, Tensor]


def edited(folder: Path, edit: Callable[[Tensors], object]) -> Path:
    """The folder, its tensors changed in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untied(folder: Path, edit: Callable[[Tensors], object] = lambda tensors: None) -> Path:
    torch.manual_seed(1)
    tiny_llama(tie_word_embeddings=False).save_pretrained(folder)
    return edited(folder, edit)


def without(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def renamed(tensors: Tensors) -> None:
    for name in list(tensors):
        tensors[name.replace(".layers.", ".blocks.")] = tensors.pop(name)


def cut(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()


REFUSED = {
    "a norm": (
        without("model.norm.weight"),
        "its files lack 1 (model.norm.weight) of the model's 21 weights: complete them, or set "
        "model.new_weights=['model.norm.weight'] to draw such at random",
    ),
    "the head": (
        without("lm_head.weight"),
        "its files lack 1 (lm_head.weight) of the model's 21 weights: complete them, or set "
        "model.config.tie_word_embeddings=true to use the embeddings as the head, or "
        "model.new_weights=['lm_head.weight'] to draw such at random",
    ),
    "other names": (
        renamed,
        "its files lack 18 (model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, "
        "model.layers.0.self_attn.v_proj.weight, ...) of the model's 21 weights; they hold 18 "
        "(model.blocks.0.input_layernorm.weight, model.blocks.0.mlp.down_proj.weight, "
        "model.blocks.0.mlp.gate_proj.weight, ...), which it has no place for: complete them, or set "
        "model.new_weights=['model.layers.0.self_attn.q_proj.weight'] to draw such at random",
    ),
    "another shape": (
        cut,
        "its files hold 1 (lm_head.weight) in another shape than its configuration says ([100, 32], not [264, 32]): "
        "correct config.json or model.config",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_files_lack_is_refused_by_name_however_they_are_read(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit, message = REFUSED[kind]
    source = settings.model_source(path=str(untied(tmp_path, edit)))
    adapted = settings.model_source(path=str(tmp_path), adapter=settings.adapter())

    def refused(load: Callable[[], object]) -> None:
        with pytest.raises(UserError) as caught:
            load()
        assert str(caught.value) == f"model.path={tmp_path}: {message}"

    refused(source.check_weights)
    for one in (source, adapted):
        refused(lambda one=one: one.load(torch.float32))
        refused(lambda one=one: one.load(torch.float32, sharding=OneRank()))
    refused(lambda: adapted.load(torch.float32, weights=False))
    source.load(torch.float32, weights=False)  # all of them come from a checkpoint
    # Files of another format have no headers to be known by.
    monkeypatch.setattr(type(source), "check_weights", lambda self: [])
    refused(lambda: source.load(torch.float32))
    refused(lambda: source.load(torch.float32, sharding=OneRank()))
    assert "REPORT" not in capsys.readouterr().err


def test_new_weights_are_drawn_as_the_model_initialises_them_and_alike_however_it_is_read(tmp_path: Path) -> None:
    untied(tmp_path, without("lm_head.weight", "model.norm.weight"))
    source = settings.model_source(path=str(tmp_path), new_weights=["lm_head.*", "model.norm.weight"])
    assert sorted(source.check_weights()) == ["lm_head.weight", "model.norm.weight"]

    def load(seed: int, **options: Any) -> Any:
        torch.manual_seed(seed)
        return source.load(torch.float32, **options)

    whole, sharded, other = load(3), load(3, sharding=OneRank()), load(4)
    for (name, one), another in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, another), name
    head = whole.lm_head.weight.detach()
    assert not torch.equal(head, other.lm_head.weight)
    assert float(head.std()) == pytest.approx(0.02, rel=0.05)  # Llama's initializer_range
    assert torch.equal(whole.model.norm.weight, torch.ones(32))
    assert torch.equal(whole.model.embed_tokens.weight, other.model.embed_tokens.weight)


def test_a_tied_model_that_a_setting_unties_lacks_its_head(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder), config={"tie_word_embeddings": False})
    with pytest.raises(UserError, match=r"lack 1 \(lm_head.weight\) of .* set model.config.tie_word_embeddings=true"):
        source.check_weights()


def test_a_head_of_its_own_beside_embeddings_that_should_be_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path)
    source = settings.model_source(path=str(tmp_path))
    edited(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert source.check_weights() == []  # a second copy does no harm
    edited(tmp_path, lambda tensors: tensors["lm_head.weight"].view(-1)[-1].add_(1))
    with pytest.raises(UserError, match=r"lm_head.weight is model.embed_tokens.weight, and its files hold two diff"):
        source.load(torch.float32, sharding=OneRank())


def test_what_may_be_new(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"model.new_weights: head matches no weight of LlamaForCausalLM"):
        settings.model_source(path=str(model_folder), new_weights=["head"]).check_weights()
    assert settings.model_source(path=str(model_folder), new_weights=["lm_head.weight"]).check_weights() == []
    with pytest.raises(UserError, match="set adapter=none"):
        settings.model_source(path=str(model_folder), new_weights=["lm_head.weight"], adapter=settings.adapter())


# Kinds of models whose tensors transformers renames, transposes, splits or joins when it reads them.
KINDS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 264},
    "gpt_neox": SIZE,
    "mixtral": {**SIZE, "num_local_experts": 4},
    "qwen3_moe": {**SIZE, "num_experts": 4, "moe_intermediate_size": 16},
}


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_lack_nothing(kind: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).save_pretrained(tmp_path)
    source = settings.model_source(path=str(tmp_path))
    assert source.check_weights() == []
    if kind == "qwen3_moe":
        edited(tmp_path, without("model.layers.1.mlp.experts.2.up_proj.weight"))
        with pytest.raises(UserError, match=r"lack 1 \(model.layers.1.mlp.experts.2.up_proj.weight\) of the model's"):
            source.check_weights()
