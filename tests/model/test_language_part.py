"""Vision-language checkpoints: which class loads them, and what of them is trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    PretrainedConfig,
    Qwen3_5Config,
)

import settings
from conftest import tiny_llama
from sft.errors import UserError
from sft.model.language_part import rest, rest_modules, said
from sft.model.loading import ModelSource
from sft.model.model_class import auto_class
from sft.model.parameters import Parameters

TEXT = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 512,
}


def tiny_gemma3() -> Gemma3ForConditionalGeneration:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config=TEXT,
        vision_config=vision | {"image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    tiny_gemma3().save_pretrained(folder)
    return folder


def source_of(folder: Path, **changes: object) -> ModelSource:
    return settings.model_source(path=str(folder), **changes)


def test_a_checkpoint_is_loaded_by_the_architecture_that_it_names() -> None:
    whole, text = Qwen3_5Config(), Qwen3_5Config().get_text_config()
    cases: list[tuple[PretrainedConfig, list[str], str]] = [
        (whole, ["Qwen3_5ForConditionalGeneration"], "AutoModelForImageTextToText"),
        (whole, ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),  # of the same configuration, its text alone
        (whole, [], "AutoModelForCausalLM"),
        (text, ["Qwen3_5ForCausalLM"], "AutoModelForCausalLM"),
        (LlamaConfig(), ["LlamaForCausalLM"], "AutoModelForCausalLM"),
        (LlamaConfig(), ["SomethingElse"], "AutoModelForCausalLM"),
    ]
    for config, names, expected in cases:
        config.architectures = names
        assert auto_class(config).__name__ == expected, names
    config = LlamaConfig()
    config.auto_map = {"AutoConfig": "c.C", "AutoModelForImageTextToText": "m.M"}
    assert auto_class(config).__name__ == "AutoModelForImageTextToText"


def test_what_text_does_not_reach_is_frozen(gemma3: Path) -> None:
    model = source_of(gemma3, attention="eager").load(torch.float32)
    assert type(model) is Gemma3ForConditionalGeneration
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # What the family's own text model has, by other names, and no more. The head is the embeddings.
    alone = Gemma3ForCausalLM(model.config.get_text_config())
    assert {name.replace("model.language_model.", "model.") for name in trained} == dict(
        alone.named_parameters()
    ).keys()
    # The same by what a text gives a gradient to.
    model.requires_grad_(True)
    model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits.sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained
    assert rest_modules(model) == ["model.vision_tower", "model.multi_modal_projector"]
    # Vision: patches 3·14·14·8 + 8, 4 positions · 8, a layer 4 · (8·8 + 8) + 2 · (8·8 + 8) + 2 · 16, a norm 16;
    # projector: 8·16 and a norm 8.
    num = (3 * 14 * 14 * 8 + 8) + 4 * 8 + 6 * (8 * 8 + 8) + 2 * 16 + 16 + 8 * 16 + 8
    assert said(model) == (
        f"Gemma3ForConditionalGeneration: only its language part is trained; the rest, {num:,} parameters "
        "(model.vision_tower, model.multi_modal_projector), is frozen and exported unchanged"
    )


def test_of_a_text_model_nothing_is_frozen() -> None:
    model = tiny_llama()
    assert rest(model) == {}
    assert said(model) is None
    Parameters().choose(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_users_patterns_choose_within_the_language_part(gemma3: Path) -> None:
    model = source_of(gemma3, parameters=Parameters(freeze=["*embed_tokens*"])).load(torch.float32)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("model.language_model.layers.") or "norm" in name for name in trained)
    with pytest.raises(UserError, match=r"\*vision_tower\* matches no parameter that is trained"):
        source_of(gemma3, parameters=Parameters(train=["*vision_tower*"])).load(torch.float32)


def test_a_resumed_model_has_the_rest_from_its_base(gemma3: Path) -> None:
    whole, resumed = tiny_gemma3(), source_of(gemma3).load(torch.float32, weights=False)
    for name in rest(whole):
        assert torch.equal(resumed.get_parameter(name), whole.get_parameter(name)), name


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "fc1"]], ids=["all-linear", "names"])
def test_an_adapter_is_in_the_language_part_alone(gemma3: Path, targets: Any) -> None:
    source = source_of(gemma3, adapter=settings.adapter(r=2, target_modules=targets))
    if targets != "all-linear":  # fc1 is in the vision tower alone
        with pytest.raises(UserError, match="fc1 is no layer of the language part of Gemma3ForConditionalGeneration: "):
            source.load(torch.float32)
        return
    adapted = {
        name.partition(".lora_")[0] for name, p in source.load(torch.float32).named_parameters() if p.requires_grad
    }
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    kinds += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert adapted == {f"model.language_model.layers.{layer}.{kind}" for layer in (0, 1) for kind in kinds}


def test_random_weights_have_no_file_for_the_rest() -> None:
    source = settings.model_source(init="random", tokenizer="unused", config={"model_type": "gemma3"})
    with pytest.raises(UserError, match=r"^model.init=random: gemma3 has more parts .*model_type=gemma3_text$"):
        source.load_config()


def test_a_field_of_the_text_is_set_in_the_text(gemma3: Path) -> None:
    config = source_of(gemma3, config={"sliding_window": 7, "tie_word_embeddings": False}).load_config()
    assert config.get_text_config().sliding_window == 7
    assert config.tie_word_embeddings is False
    assert config.get_text_config().tie_word_embeddings is False


def test_a_folder_is_loaded_as_what_it_was(gemma3: Path) -> None:
    assert json.loads((gemma3 / "config.json").read_text())["architectures"] == ["Gemma3ForConditionalGeneration"]
    model = AutoModelForImageTextToText.from_pretrained(gemma3)
    ours = source_of(gemma3, attention="eager").load(torch.float32)
    assert {name: list(p.shape) for name, p in model.named_parameters()} == {
        name: list(p.shape) for name, p in ours.named_parameters()
    }
