"""Grouped experts against a loop over experts."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import settings
from conftest import tiny_llama
from sft.model import experts

IDS = torch.tensor([[5, 1, 9, 9, 200, 31, 7, 7, 3]])


def mixtral(intermediate_size: int = 24) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config)


def experts_of(model: PreTrainedModel) -> torch.nn.Module:
    return next(module for name, module in model.named_modules() if name.endswith("experts"))


def by_hand(module: torch.nn.Module, hidden_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Token by token, expert by expert."""
    rows = []
    for hidden, chosen, weights in zip(hidden_TC, chosen_TK, weights_TK, strict=True):
        row = torch.zeros_like(hidden)
        for expert, weight in zip(chosen.tolist(), weights, strict=True):
            gate, up = (module.gate_up_proj[expert] @ hidden).chunk(2)
            row = row + weight * (module.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


def some(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6, 16, generator=generator).to(dtype)
    # Expert 2 is never chosen, 0 by every token.
    chosen = torch.tensor([[0, 1], [0, 3], [1, 0], [0, 3], [3, 0], [0, 1]])
    return hidden, chosen, torch.rand(6, 2, generator=generator).to(dtype)


@pytest.mark.parametrize("width", [24, 22], ids=["aligned", "unaligned"])  # 22 · 4 is no multiple of 16
def test_grouped_is_the_sum_over_experts(width: int) -> None:
    module = experts_of(mixtral(width))
    grads, outs = [], []
    for function in (experts.grouped_experts, by_hand):
        module.zero_grad()
        out = function(module, *some(torch.float32))
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(*outs, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert not grads[0][0][2].any()  # of the expert that nobody chose


def test_narrow_experts_in_bf16() -> None:
    module = experts_of(mixtral(20).bfloat16())  # 40 bytes a row, for which torch's kernel raises
    out, expected = (f(module, *some(torch.bfloat16)) for f in (experts.grouped_experts, by_hand))
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-2)


def test_autocast_rounds_the_weights_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    module = experts_of(mixtral())
    rounded = copy.deepcopy(module).bfloat16()
    inputs = some(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        exact = experts.grouped_experts(module, *inputs)
        monkeypatch.setattr(experts, "ROUNDED_ON", ("cpu",))
        out = experts.grouped_experts(module, *inputs)
    assert torch.equal(out, experts.grouped_experts(rounded, *inputs))
    assert not torch.equal(out, exact)
    out.sum().backward()
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}
    assert module.gate_up_proj is dict(module.named_parameters())["gate_up_proj"]  # the parameters are back


def test_a_model_is_loaded_with_grouped_experts(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    grads = []
    for name in (experts.NAME, "eager"):
        source = settings.model_source(path=str(tmp_path), attention="eager", gradient_checkpointing=True)
        model = source.load(torch.float32)
        assert model.config._experts_implementation == experts.NAME
        assert experts.kernel(model) == "one grouped product"
        model.config._experts_implementation = name
        torch.nn.functional.cross_entropy(model(IDS, use_cache=False).logits[0, :-1], IDS[0, 1:]).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-7, rtol=1e-4, msg=name)
    assert experts.kernel(model) == "a product for each expert"
    assert experts.kernel(tiny_llama()) is None
