"""Batched answers with the KV cache are those of a plain loop, and the model is afterwards as it was."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from conftest import tiny_llama
from sft.evaluation.generation import answer, answering
from sft.model import noise, router
from sft.model.attention import NAME as PACKED

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8], [2, 7, 1, 8]]
STOPS = [7, 11]


def plain(model: PreTrainedModel, prompt: list[int], num: int) -> list[int]:
    """Each token by a pass over all before it, alone."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num and (len(ids) == len(prompt) or ids[-1] not in STOPS):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if kind == "windows":
        return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4))
    if kind == "experts":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    return tiny_llama(**SIZES)


@pytest.mark.parametrize("kind", ["llama", "windows", "experts"])
def test_answers_are_those_of_a_plain_loop(kind: str) -> None:
    model = made(kind)
    with torch.no_grad():
        expected = [plain(model.eval(), prompt, 12) for prompt in PROMPTS]
    assert len({len(ids) for ids in expected}) > 1
    if kind == "experts":
        router.attach(model, 0.1, print)
    noise.attach(model, 5.0)
    model.set_attn_implementation(PACKED)
    model.train().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with answering(model):
        assert not any(module.training for module in model.modules())
        assert answer(model, PROMPTS, max_new_tokens=12, pad=0, stops=STOPS, width=14) == expected
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == PACKED
    assert getattr(model.config, "output_router_logits", None) is (True if kind == "experts" else None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


def test_the_model_is_as_it_was_after_a_failure_too() -> None:
    model = made("experts").train()
    router.attach(model, 0.1, print)
    model.set_attn_implementation(PACKED)
    with pytest.raises(IndexError, match="index out of range"), answering(model):
        answer(model, [[SIZES["vocab_size"]]], max_new_tokens=2, pad=0, stops=STOPS)
    assert model.training and model.config._attn_implementation == PACKED and model.config.output_router_logits


def test_compiled_layers_make_no_graph_for_an_answer() -> None:
    model = made("llama")
    for layer in model.model.layers:
        layer.compile(backend=lambda graph, inputs: pytest.fail("a graph was made"))
    with answering(model):
        answer(model, PROMPTS, max_new_tokens=2, pad=0, stops=STOPS)


def test_no_time_is_left() -> None:
    model, asked = made("llama"), []

    def is_over() -> bool:
        asked.append(True)
        return len(asked) == 3

    with answering(model):
        assert [*map(len, answer(model, PROMPTS[:1], max_new_tokens=9, pad=0, stops=[], is_over=is_over))] == [3]
