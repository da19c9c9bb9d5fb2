"""Packed attention is what each family's own eager attention makes of each sample by itself, in loss and gradients."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from made_up import SIZE, pack
from sft.data.labels import IGNORE
from sft.model import varlen
from sft.model.attention import NAME, kernel
from sft.model.isolation import attending
from sft.model.loss import nll

LENGTHS = [13, 6, 1, 17]  # some longer than windows and chunks, some not
WINDOW, CHUNK = 5, 4
ONE_OF_EACH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
FAMILIES: dict[str, dict[str, Any]] = {
    # sliding windows
    "mistral": {"sliding_window": WINDOW},
    "phi3": {"sliding_window": WINDOW, "pad_token_id": 0},
    "cohere2": ONE_OF_EACH,
    "gemma3_text": ONE_OF_EACH | {"head_dim": 8},
    # a window of 0, whose layers there are none of
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    # soft-capped scores
    "gemma2": ONE_OF_EACH | {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    # chunks
    "llama4_text": EXPERTS
    | {"attention_chunk_size": CHUNK, "layer_types": ["chunked_attention", "full_attention"], "head_dim": 8}
    | {"intermediate_size_mlp": 48, "no_rope_layers": [1, 0]},
    # heads of queries and values of unequal widths
    "deepseek_v3": MLA | {"first_k_dense_replace": 2, "num_key_value_heads": 4},
    # sinks
    "gpt_oss": EXPERTS | ONE_OF_EACH | {"head_dim": 8},
    "granite_swa": ONE_OF_EACH,
    "flint": ONE_OF_EACH | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mimo_v2_flash": ONE_OF_EACH
    | {"num_key_value_heads": 1, "head_dim": 8, "v_head_dim": 12, "mlp_layer_types": ["dense", "dense"]},
    "deepseek_v4": EXPERTS
    | {"layer_types": ["sliding_attention"] * 2, "sliding_window": WINDOW, "head_dim": 16, "num_key_value_heads": 1}
    | {"q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "moe_intermediate_size": 16, "n_routed_experts": 4},
    # another layout of the output than most take
    "jetmoe": EXPERTS | {"kv_channels": 8},
}


def made(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZE | {"initializer_range": 0.3} | FAMILIES[family]))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_as_its_own_attention_makes_it(family: str) -> None:
    model, batch = made(family), pack(LENGTHS)
    total = torch.zeros(())
    for start, end in pairwise(batch["cu_seqlens"].tolist()):
        ids, labels = (batch[name][:, start:end] for name in ("input_ids", "labels"))
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels[0, 1:], ignore_index=IGNORE, reduction="sum")
    total.backward()
    expected = gradients(model)
    with attending(model, NAME):
        found = nll(model, batch, plain_head=False)
        found.backward()
    made_here = gradients(model)
    assert found.item() == pytest.approx(total.item(), rel=1e-6)
    assert made_here.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (made_here[name] - gradient).norm() <= 5e-6 * gradient.norm() + 1e-6, name
    assert not any(name.endswith("sinks") for name in expected) or any(
        gradient.norm() > 1e-3 for name, gradient in expected.items() if name.endswith("sinks")
    )


BY_KERNEL = "torch.nn.attention.varlen (FlashAttention)"


@pytest.mark.parametrize(
    ("family", "on_the_processor", "on_cuda"),
    [
        ("mistral", "scaled_dot_product_attention, a call for each sample", BY_KERNEL),
        ("llama4_text", "scaled_dot_product_attention, a call for each sample", BY_KERNEL),
        ("gpt_oss", "scores written out, a call for each sample", BY_KERNEL),
        ("gemma2", "scores written out, a call for each sample", "scores written out, a call for each sample"),
        ("wide", "scaled_dot_product_attention, a call for each sample", f"{BY_KERNEL}; scaled_dot_product_attention"),
    ],
)
def test_kernel_is_named(family: str, on_the_processor: str, on_cuda: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("mistral" if family == "wide" else family)
    if family == "wide":  # as one layer in six of Gemma 4
        model.model.layers[1].self_attn.head_dim = 512
    assert kernel(model, torch.device("cpu"), torch.bfloat16) == "eager"
    with attending(model, NAME):
        assert kernel(model, torch.device("cpu"), torch.bfloat16) == on_the_processor
        monkeypatch.setattr(varlen, "takes", lambda query, key, value, window: query.shape[-1] <= 256)
        assert kernel(model, torch.device("cpu"), torch.bfloat16).startswith(on_cuda)
