"""Useful operations are those that torch counts, and a device's peak is that of its data sheet."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

import settings
from conftest import tiny_llama
from made_up import SIZE
from sft.model.flops import of_model, peak
from sft.model.parameters import Parameters

LENGTH = 40


def counted(model: PreTrainedModel) -> float:
    """By torch, with every token supervised; which counts the scores above the diagonal as well."""
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(LENGTH)[None], use_cache=False).logits.sum().backward()
    config = model.config
    masked = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * LENGTH**2
    return counter.get_total_flops() - masked


@pytest.mark.parametrize("trained", ["everything", "an adapter", "a matrix of each layer"])
def test_flops_are_those_that_torch_counts(trained: str) -> None:
    model = tiny_llama(attn_implementation="eager")
    if trained == "an adapter":
        settings.adapter(r=4).add(model)
    elif trained != "everything":
        Parameters(train=["*.up_proj.*"]).choose(model)
    assert of_model(model).of(LENGTH, LENGTH, LENGTH**2) == counted(model)


def test_of_experts_those_count_that_a_token_chooses() -> None:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}
    config = Qwen3MoeConfig(**SIZE | experts)
    flops = of_model(Qwen3MoeForCausalLM(config))
    hidden, width = config.hidden_size, config.num_attention_heads * 16
    attention = 2 * hidden * width + 2 * hidden * config.num_key_value_heads * 16
    layer = attention + hidden * 4 + 2 * 3 * hidden * 16
    assert flops.token == 6 * config.num_hidden_layers * layer
    assert flops.supervised == 6 * hidden * config.vocab_size
    assert flops.square == 6 * config.num_hidden_layers * width


def test_peak_of_a_device_by_its_name() -> None:
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == 989e12
    assert peak("NVIDIA H100 PCIe") == 756e12
    assert peak("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak("Some other card") is None
