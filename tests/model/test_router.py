"""The load-balancing loss against transformers' own, of one sample at a time."""

from itertools import pairwise

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from conftest import tiny_llama
from made_up import SIZE, pack
from sft.errors import UserError
from sft.model import attention, router
from sft.model.loss import nll

LENGTHS = [5, 9, 9, 3, 17]


def mixtral(**options: object) -> PreTrainedModel:
    return MixtralForCausalLM(MixtralConfig(**SIZE, num_local_experts=4, **options))


def qwen(**options: object) -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **options)
    )


@pytest.mark.parametrize("made", [mixtral, qwen])
def test_a_pack_has_the_sum_of_its_samples(made: object) -> None:
    torch.manual_seed(0)
    model = made(attn_implementation=attention.NAME).train()  # type: ignore[operator]
    other = made(attn_implementation="eager").train()  # type: ignore[operator]
    other.load_state_dict(model.state_dict())
    batch = pack(LENGTHS)
    measured = router.attach(model, 0.1, print)
    assert measured is not None
    nll(model, batch, plain_head=True)
    total, load = measured.measure(batch).values()
    total.backward()
    expected = 0.0
    for start, end in pairwise(batch["cu_seqlens"].tolist()):
        outputs = other(batch["input_ids"][:, start:end], output_router_logits=True, use_cache=False)
        term = (end - start) * load_balancing_loss_func(outputs.router_logits, 4, 2)
        term.backward()
        expected += term.item()
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert load.sum(1).tolist() == [2 * sum(LENGTHS)] * 2
    of_other = dict(other.named_parameters())
    assert of_other["model.layers.0.mlp.gate.weight"].grad.abs().max() > 1e-3
    for name, parameter in model.named_parameters():
        if (grad := of_other[name].grad) is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5, msg=name)


def test_an_empty_micro_batch_adds_nothing() -> None:
    model = mixtral(attn_implementation=attention.NAME).train()
    batch = pack([1]) | {"num_tokens": 0}
    measured = router.attach(model, 0.1, print)
    assert measured is not None
    nll(model, batch, plain_head=True)
    total, load = measured.measure(batch).values()
    assert (total.item(), load.sum().item(), total.requires_grad) == (0, 0, True)


def test_models_without_experts_or_such_a_loss_are_refused() -> None:
    with pytest.raises(UserError, match=r"loss.router_aux=0.1: LlamaForCausalLM is no mixture of experts: set"):
        router.attach(tiny_llama(), 0.1, print)
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SIZE, n_routed_experts=4))
    with pytest.raises(
        UserError, match=r"DeepseekV3ForCausalLM has no such loss in transformers: set loss.router_aux=0"
    ):
        router.attach(model, 0.1, print)


def test_experts_without_it_are_said_once() -> None:
    lines: list[str] = []
    assert router.attach(mixtral(), 0, lines.append) is None
    assert router.attach(tiny_llama(), 0, lines.append) is None
    assert lines == ["4 experts without a load-balancing loss: loss.router_aux=0.001 adds the one of its authors"]
