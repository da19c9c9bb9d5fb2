"""What hangs together in a configuration still does in its small form, and each kind of layer is kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from sft.model.model_class import of_folder
from sft.proof import shrink, small_config
from sft.proof.small_config import Form

LINEAR_HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}  # of fewer channels, rounding is amplified
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"

# What each kind of architecture must have when it is small, and the parameters that it doesn't use itself.
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "llama": ({"num_hidden_layers": 2}, ""),
    "gemma3_text": ({"layer_types": [SLIDING, FULL], "sliding_window": 16}, ""),
    "gemma4_text": ({"layer_types": [SLIDING, FULL], "sliding_window": 16, "vocab_size_per_layer_input": 97}, ""),
    "gpt_oss": ({"layer_types": [SLIDING, FULL], "num_local_experts": 4, "num_experts_per_tok": 2}, ""),
    "falcon": ({"num_attention_heads": 71, "multi_query": True}, ""),
    "falcon_h1": ({"num_hidden_layers": 2, "mamba_chunk_size": 16, "mamba_n_groups": 1}, ""),
    "mamba": ({"num_hidden_layers": 2, "expand": 2}, ""),
    "mamba2": ({"chunk_size": 16, "expand": 2}, ""),
    "jamba": ({"layers_block_type": [*4 * ["mamba"], "attention"]}, ""),
    "qwen3_next": ({"layer_types": [LINEAR, FULL], "linear_conv_kernel_dim": 4, "num_experts": 4, **LINEAR_HEADS}, ""),
    "kimi_linear": ({"layer_types": [LINEAR, LINEAR, FULL], "linear_head_dim": 32}, ""),
    "deepseek_v3": ({"first_k_dense_replace": 1, "num_hidden_layers": 2, "n_group": 2, "topk_group": 1}, ""),
    "zamba2": ({"layers_block_type": [LINEAR, "hybrid"], "hybrid_layer_ids": [1]}, ""),
    "bloom": ({"n_layer": 2}, ""),
    "mbart": ({"decoder_layers": 2, "encoder_layers": 2}, "encoder_attn"),
    "gemma3": ({}, "vision_tower|multi_modal_projector"),
}
IDS = (torch.arange(48).view(2, 24) * 5) % 97


@pytest.mark.parametrize("kind", KINDS)
def test_small_form_of_each_kind_runs_and_every_parameter_matters(kind: str, tmp_path: Path) -> None:
    expected, unused = KINDS[kind]
    shrink.write_model(tmp_path, AutoConfig.for_model(kind), 97, seed=0)
    model = of_folder(str(tmp_path)).from_pretrained(tmp_path).train()
    assert model.config.model_type == kind
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    found = {name: getattr(model.config, name) for name in expected}
    assert found == expected
    logits = model(input_ids=IDS, use_cache=False).logits
    assert logits.shape == (2, 24, 97)
    cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    without = {name for name, one in model.named_parameters() if one.grad is None or not one.grad.any()}
    assert {name for name in without if not (unused and any(part in name for part in unused.split("|")))} == set()


def fields(kind: str, form: Form, **changes: Any) -> dict[str, Any]:
    return small_config.small(AutoConfig.for_model(kind, **changes), form)


def test_widths_are_divided_by_what_divides_heads_and_their_widths() -> None:
    # Mamba2: 128 heads of 64 channels are twice 4096; 4 and 16 leave 32 heads of 4, twice 64.
    small = fields("mamba2", Form(97, heads=4, head=16))
    assert [small[name] for name in ("num_heads", "head_dim", "hidden_size", "n_groups", "expand")] == [32, 4, 64, 2, 2]
    # DeepSeek-V3: 128 + 64 channels of a head, 128 of its values, ranks 1536 and 512.
    small = fields("deepseek_v3", Form(97, heads=16, head=16))
    names = ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim", "v_head_dim", "hidden_size")
    assert [small[name] for name in names] == [8, 8, 4, 12, 8, 28]
    assert [small[name] for name in ("q_lora_rank", "kv_lora_rank", "n_shared_experts")] == [6, 2, 1]


def test_divisors_leave_several_even_heads_and_about_64_channels() -> None:
    llama = AutoConfig.for_model("llama", num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    heads, head = small_config.divisors(llama)[0]
    assert 4096 // (heads * head) == 64 and 8 // heads >= 2 and 128 // head % 2 == 0


def test_a_configuration_of_parts_alone_follows_the_widest() -> None:
    # BLT: parts of 768, 1024 and 2048 channels; 64 of the widest are left in the preferred form.
    heads, head = small_config.divisors(AutoConfig.for_model("blt"))[0]
    assert 2048 // (heads * head) == 64


def test_lists_of_layers_and_their_numbers_are_cut_alike() -> None:
    # Gemma 3n: 35 layers, each fifth full, the first 10 sparse, the last 15 with keys and values of others.
    small = fields("gemma3n_text", Form(97, 1, 32))
    num_layers = small["num_hidden_layers"]
    assert {*small["layer_types"]} == {SLIDING, FULL} and {*small["activation_sparsity_pattern"]} == {0.95, 0.0}
    assert len(small["layer_types"]) == len(small["intermediate_size"]) == num_layers <= 8
    assert 1 <= small["num_kv_shared_layers"] < num_layers
    # Gemma 4: its full layers have heads twice as wide.
    assert list(fields("gemma4_text", Form(97, 1, 32))["per_layer_config"].items()) == [(1, {"head_dim": 16})]
    # Llama 4: layers without rotation and with experts are numbered.
    llama4 = fields("llama4_text", Form(97, 1, 32), moe_layers=[1, 3, 5], num_hidden_layers=8)
    assert [llama4["moe_layers"], llama4["no_rope_layers"]] == [[1, 2], [1, 1, 0, 0]]  # of 0, 1, 3 and 7
    assert llama4["attention_chunk_size"] == 16


def test_numbers_of_all_layers_are_no_entries_for_each() -> None:
    small = fields("llama4_text", Form(97, 1, 32))  # all 48 layers have experts, each fourth is full
    assert [small[name] for name in ("num_hidden_layers", "moe_layers", "no_rope_layers")] == [2, [0, 1], [1, 0]]
    assert small["layer_types"] == ["chunked_attention", FULL]
    small = fields("lfm2", Form(97, 1, 32), num_hidden_layers=16, full_attn_idxs=[2, 5, 8, 10, 12, 14])
    assert [small["layer_types"], small["full_attn_idxs"]] == [["conv", FULL], [1]]
    assert fields("lfm2", Form(97, 1, 32))["full_attn_idxs"] == [0, 1]  # all of 32


def test_two_layers_of_each_kind() -> None:
    small = fields("qwen3_next", Form(97, 1, 32, layers=2))
    assert small["layer_types"] == [LINEAR, LINEAR, FULL, FULL]


def test_rotary_lists_follow_the_width_of_a_head() -> None:
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 48, "mrope_section": [24, 20, 20]}
    cut = small_config.cut_rotary(factors, 8)
    assert len(cut["short_factor"]) == 6 and sum(cut["mrope_section"]) == 8 and min(cut["mrope_section"]) >= 2


def test_ids_fit_the_vocabulary_and_randomness_is_off() -> None:
    small = fields("llama", Form(97, 1, 16), eos_token_id=[5, 9000], pad_token_id=9000, attention_dropout=0.1)
    assert [small["eos_token_id"], small["pad_token_id"], small["vocab_size"]] == [[5, 96], 96, 97]
    assert small["attention_dropout"] == 0 and small["initializer_range"] == 0.1
    assert fields("llama", Form(None, 1, 16), eos_token_id=9000)["eos_token_id"] == 9000


def test_a_model_whose_tokens_see_none_before_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Blind(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            return type("Outputs", (), {"logits": torch.nn.functional.one_hot(input_ids, 97).float()})

    model: Any = Blind()
    with pytest.raises(ValueError, match="don't depend on earlier tokens"):
        shrink.check_runs(model)


def test_what_is_all_alike_and_not_1_or_left_undefined_gets_noise() -> None:
    model: Any = torch.nn.ParameterDict(
        {
            "gate": torch.zeros(5),
            "scale": torch.full((5,), 0.5),
            "norm": torch.ones(5),
            "empty": torch.full((5,), torch.nan),
            "drawn": torch.arange(5.0),
        }
    )
    with shrink.deterministic(0):
        shrink.stir(model)
    assert model["drawn"].tolist() == [0, 1, 2, 3, 4] and model["norm"].tolist() == [1] * 5
    for name, mean in (("gate", 0), ("scale", 0.5), ("empty", 0)):
        assert len({*model[name].tolist()}) == 5 and (model[name] - mean).abs().max() < 0.3
