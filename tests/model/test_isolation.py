"""Samples that run apart: the same numbers as in one row, whatever is drawn, and when layers are computed twice."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from conftest import tiny_llama
from made_up import SIZE, drawn
from sft.data.batch import Batch, make_batch
from sft.data.labels import IGNORE
from sft.model import attention, noise, router
from sft.model.isolation import Isolation, one_by_one, own_attention, use_attention
from sft.model.loss import Objective, head_is_plain_matrix
from sft.proof.excerpt import Excerpt
from sft.training.module import SFTModule

LENGTHS = [5, 9, 9, 3, 17]
OBJECTIVE = Objective(label_smoothing=0.1, z_loss=0.01, router_aux=0.3)
PACKED, APART = Isolation(), Isolation(apart=True)


def samples() -> Excerpt:
    rng, pairs = np.random.default_rng(0), []
    for length in LENGTHS:
        ids = rng.integers(0, 256, length, dtype=np.int32)
        pairs.append((ids, np.where(np.arange(length) < 2, IGNORE, ids).astype(np.int32)))
    return Excerpt(pairs, 5, [np.array(drawn(labels.tolist()), dtype=np.float32) for _, labels in pairs])


def batch_of(*numbers: int) -> Batch:
    return make_batch(samples(), np.array(numbers, dtype=np.int64), 1.0, draw=(0, 7))


def llama(**changes: object) -> PreTrainedModel:
    return tiny_llama(attention_dropout=0.2, attn_implementation=attention.NAME, **changes)


def gpt2(**changes: object) -> PreTrainedModel:
    sizes = {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation=attention.NAME, **changes))


def qwen_moe() -> PreTrainedModel:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE, **experts, attn_implementation=attention.NAME))


def module(model: PreTrainedModel, isolation: Isolation, neftune: float = 5.0, router_aux: float = 0.0) -> Any:
    """What trains the model, with stand-ins for trainer and data."""
    source: Any = SimpleNamespace(activation_offload=False)
    made: Any = SFTModule(source, None, None, 1, 0, objective=OBJECTIVE)  # type: ignore[arg-type]
    data = SimpleNamespace(step=lambda _: SimpleNamespace(num_tokens=1))
    made._trainer = SimpleNamespace(world_size=1, accumulate_grad_batches=1, global_step=0, datamodule=data)
    made.model, made.isolation, made.plain_head = model, isolation, head_is_plain_matrix(model)
    made.router = router.attach(model, router_aux, print)
    noise.attach(model, neftune)
    return made


def step(made: Any, *batches: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sums of all forward passes, and the gradients of one backward pass."""
    made.model.zero_grad()
    made.step_sums = {}
    sum(made.training_step(batch, 0) for batch in batches).backward()
    gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
    return made.step_sums, gradients


def assert_equal(one: tuple[dict[str, Tensor], ...], other: tuple[dict[str, Tensor], ...]) -> None:
    for first, second in zip(one, other, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            torch.testing.assert_close(value, second[name], rtol=1e-4, atol=5e-5, msg=name)


def test_a_batch_in_parts() -> None:
    batch = batch_of(3, 0)
    batch["samples"], batch["fixed"] = np.array([3, 0]), torch.tensor([1, 3, 5])
    batch["counts"][:, 2], batch["num_parts"] = [1, 2], 3
    first, second, empty = one_by_one(batch)
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert first["input_ids"].tolist() == [ids[:3]] and second["input_ids"].tolist() == [ids[3:]]
    assert second["labels"].tolist() == [[IGNORE, IGNORE, *ids[5:]]]
    assert second["position_ids"].tolist() == [[*range(5)]]
    assert (first["predicting"].tolist(), second["predicting"].tolist()) == ([1], [1, 2, 3])
    assert [*first["weights"].tolist(), *second["weights"].tolist()] == batch["weights"].tolist()  # type: ignore[union-attr]
    assert [part["cu_seqlens"].tolist() for part in (first, second, empty)] == [[0, 3], [0, 5], [0, 1]]
    assert {part["cu_seqlens"].dtype for part in (first, second, empty)} == {torch.int32}
    assert [(part["num_tokens"], part["max_seqlen"]) for part in (first, second, empty)] == [(3, 3), (5, 5), (0, 1)]
    assert (first["fixed"].tolist(), second["fixed"].tolist(), empty["fixed"].tolist()) == ([1], [0, 2], [])
    assert [part["samples"].tolist() for part in (first, second, empty)] == [[3], [0], []]
    assert [part["counts"].tolist() for part in (first, second, empty)] == [[[3, 1, 1]], [[5, 3, 2]], [[1, 0, 0]]]
    assert second["keys"].tolist() == batch["keys"][3:].tolist() and second["seeds"] == [int(batch["keys"][3])]
    assert empty["labels"].tolist() == [[IGNORE]] == [labels[:1]]
    assert (empty["predicting"].tolist(), empty["weights"].tolist()) == ([], [])  # type: ignore[union-attr]
    # A rank that has nothing of a step keeps its empty batch, and is filled up like the others.
    nothing = make_batch(samples(), np.array([], dtype=np.int64), 1.0) | {"num_parts": 2}
    assert [part["num_tokens"] for part in one_by_one(nothing)] == [0, 0]  # type: ignore[arg-type]


@pytest.mark.parametrize("made", [llama, gpt2, qwen_moe])
def test_apart_is_packed(made: Any) -> None:
    torch.manual_seed(0)
    model = made().train()
    trained = module(model, PACKED, router_aux=0.3 if made is qwen_moe else 0.0)
    packed = step(trained, batch_of(4, 0, 2), batch_of(1, 3))
    trained.isolation = APART
    batch = batch_of(2, 1, 0, 4, 3)
    batch["num_parts"] = 8  # empty parts add nothing
    assert_equal(step(trained, batch), packed)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("made", [llama, gpt2])
def test_recomputed_layers_see_their_own_tokens(made: Any, own: bool) -> None:
    torch.manual_seed(0)
    model = made().train()
    trained = module(model, APART)
    if own:  # draws its attention's dropout from torch's stream
        trained.isolation = Isolation(own_attention(model), apart=True)
        use_attention(model, own_attention(model))
    expected = step(trained, batch_of(4, 0, 2), batch_of(1, 3))
    # By sample, whatever was drawn before.
    assert_equal(step(trained, batch_of(1, 4), batch_of(0, 3, 2)), expected)
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_equal(step(trained, batch_of(4, 0, 2), batch_of(1, 3)), expected)
    # And it is noise: without, the loss is another.
    model.eval()
    quiet = step(trained, batch_of(4, 0, 2), batch_of(1, 3))
    assert abs(quiet[0]["nll"][0] - expected[0]["nll"][0]) > 1e-2
