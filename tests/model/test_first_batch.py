"""Faults of each kind, planted in a tiny Llama, and what the model's first batch says of them."""

import contextlib
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from conftest import tiny_llama
from sft.errors import UserError
from sft.model import attention, first_batch, measured_pass, noise
from sft.model.first_batch import Prover
from sft.model.found import Difference, Proof
from sft.model.isolation import Isolation
from sft.model.loss import head_is_plain_matrix

PACKED, APART, OWN = Isolation(), Isolation(apart=True), Isolation("sdpa", apart=True)
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
Fault = Callable[[PreTrainedModel, pytest.MonkeyPatch], None]


def made(**config: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return tiny_llama(attn_implementation="packed", initializer_range=0.2, **config).train()


def proven(model: PreTrainedModel, dtype: torch.dtype = torch.float32, **settings: Any) -> Proof:
    draw = torch.Generator().manual_seed(0)
    samples = [torch.randint(0, 264, (length,), generator=draw) for length in (11, 7, 9)]
    forward = contextlib.nullcontext if dtype == torch.float32 else lambda: torch.autocast("cpu", torch.bfloat16)
    asked = {"attention": "auto", "isolate": "auto", **settings}
    return Prover(model, samples, plain_head=head_is_plain_matrix(model), dtype=dtype, forward=forward, **asked).prove()


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_packed_model_is_left_as_it_was(dtype: torch.dtype, checkpointing: bool) -> None:
    model = made(attention_dropout=0.5)
    noise.attach(model, 5.0)
    model.model.norm.eval()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    state, weights = torch.get_rng_state(), [parameter.clone() for parameter in model.parameters()]
    proof = proven(model, dtype)
    assert proof.isolation == PACKED and proof.reason is None and proof.training_mode
    assert {*proof.differences} == {"noise", "alone", "packed"}
    assert proof.differences["packed"].reach == proof.differences["packed"].leak == 0
    assert torch.equal(state, torch.get_rng_state())
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [name for name, module in model.named_modules() if not module.training] == ["model.norm"]
    assert model.config.attention_dropout == model.model.layers[0].self_attn.attention_dropout == 0.5
    assert model.config._attn_implementation == "packed"
    assert not any(module._forward_pre_hooks for module in model.model.layers.modules())


def with_attention(change: Callable[..., Tensor]) -> Fault:
    """Of this project's attention for one sample."""

    def plant(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
        original = attention._attend
        patch.setattr(attention, "_attend", lambda *arguments: change(original, *arguments))

    return plant


def scaled(original: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *others: Any) -> Tensor:
    return original(query, key, value, scale * 1.5, *others)


def without_a_causal_mask(
    original: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, *others: Any
) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def windowed(original: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, drop: float, *_: Any) -> Tensor:
    return original(query, key, value, scale, drop, 4, None, None)


class Changed(nn.Module):
    """A layer's MLP whose output [1, T, C] is changed."""

    def __init__(self, mlp: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mlp, self.change = mlp, change

    def forward(self, hidden: Tensor) -> Tensor:
        return self.change(self.mlp(hidden))


def with_mlp(change: Callable[[Tensor], Tensor]) -> Fault:
    def plant(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
        model.model.layers[0].mlp = Changed(model.model.layers[0].mlp, change)

    return plant


def running(share: float) -> Fault:
    """A state that runs on from sample to sample, as that of a state-space layer."""
    return with_mlp(lambda hidden: hidden + share * (hidden.cumsum(1) - hidden))


def by_place(hidden: Tensor) -> Tensor:
    """What counts tokens from the beginning of the row."""
    place = torch.arange(hidden.shape[1], dtype=hidden.dtype)
    return hidden + (place / 4)[:, None].sin()


class BackwardLeak(torch.autograd.Function):
    """Right forward; backward a token gets a share of the next one's gradient, whosever that is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + 0.05 * F.pad(grad[:, 1:], (0, 0, 0, 1))


def gain_without_a_gradient(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    """A parameter of attention, as the sinks of GPT-OSS, that this project's has no gradient for."""
    for layer in model.model.layers:
        layer.self_attn.gain = nn.Parameter(torch.full((32,), 1.1))
        original = layer.self_attn.forward

        def forward(self: nn.Module, *arguments: Any, original: Any = original, **named: Any) -> tuple[Tensor, Any]:
            out, weights = original(*arguments, **named)
            gain = self.gain.detach() if self.config._attn_implementation == "packed" else self.gain
            return out * gain, weights

        layer.self_attn.forward = types.MethodType(forward, layer.self_attn)


def one_sample_less(model: PreTrainedModel, patch: pytest.MonkeyPatch) -> None:
    """The first two samples of a row are taken for one."""
    original = attention._lengths.__wrapped__
    merged = lambda bounds: [sum(found[:2]), *found[2:]] if len(found := original(bounds)) > 1 else found  # noqa: E731
    patch.setattr(attention, "_lengths", merged)


def raises(original: Any, *_: Any) -> Tensor:
    raise NotImplementedError("no kernel for this\nmodel")


FAULTS = {
    "scale": (with_attention(scaled), OWN, "doesn't compute by packed attention what its own does"),
    "mask": (with_attention(without_a_causal_mask), OWN, "doesn't compute by packed attention what its own does"),
    "window": (with_attention(windowed), OWN, "doesn't compute by packed attention what its own does"),
    "gradient": (gain_without_a_gradient, OWN, "doesn't compute by packed attention what its own does"),
    "exception": (with_attention(raises), OWN, "(NotImplementedError: no kernel for this)"),
    "boundary": (one_sample_less, APART, "samples of llama in a row depend on each other"),
    "state": (running(0.05), APART, "samples of llama in a row depend on each other"),
    "small state": (running(1e-4), APART, "samples of llama in a row depend on each other"),
    "backward": (with_mlp(BackwardLeak.apply), APART, "samples of llama in a row depend on each other"),
    "place": (with_mlp(by_place), APART, "computes something else of packed samples"),
}


@BOTH
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, isolation, reason = FAULTS[name]
    model = made()
    plant(model, monkeypatch)
    proof = proven(model, dtype)
    assert proof.isolation == isolation
    assert proof.reason and reason in proof.reason and "one at a time" in proof.reason


@pytest.mark.parametrize(
    ("fault", "settings", "message"),
    [
        (
            "scale",
            {"attention": "packed"},
            r"model.attention=packed: llama computes something else by it: alone .*",
        ),
        (
            "scale",
            {"isolate": "packed"},
            "model.isolate=packed: llama computes something else by packed attention",
        ),
        (
            "state",
            {"isolate": "packed"},
            r"model.isolate=packed: llama doesn't keep .*alone .*packed .*between",
        ),
    ],
    ids=["attention", "isolate", "leak"],
)
def test_what_is_asked_for_and_wrong_is_refused(
    fault: str, settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    FAULTS[fault][0](model, monkeypatch)
    with pytest.raises(UserError, match=message):
        proven(model, **settings)


@pytest.mark.parametrize(
    ("settings", "isolation"),
    [
        ({"attention": "own"}, OWN),
        ({"isolate": "apart"}, APART),
        ({"attention": "eager"}, Isolation("eager", apart=True)),
        ({"attention": "packed", "isolate": "packed"}, PACKED),
    ],
    ids=["own", "apart", "eager", "packed"],
)
def test_settings_decide(settings: dict[str, str], isolation: Isolation) -> None:
    proof = proven(made(), **settings)
    assert proof.isolation == isolation and proof.reason is None
    with contextlib.suppress(KeyError):
        assert proof.differences["alone"].log_prob < 1e-5


def test_what_own_attention_does_in_another_shape_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    # This project's attention is off by a thousandth; the model's own by half of that beside another row.
    with_attention(lambda original, *arguments: original(*arguments) * 1.001)(model := made(), monkeypatch)
    assert proven(model).isolation == OWN
    noisy = with_mlp(lambda hidden: hidden * (1.0005 if len(hidden) > 1 else 1.0))
    noisy(model, monkeypatch)
    proof = proven(model)
    assert proof.isolation == PACKED
    assert 2e-5 < proof.differences["alone"].log_prob < 8 * proof.differences["noise"].log_prob


@pytest.mark.parametrize("attention", ["own", "sdpa", "eager"])
def test_an_attention_without_boundaries_packs_nothing(attention: str) -> None:
    with pytest.raises(UserError, match=f"^model.isolate=packed: model.attention={attention} knows no boundaries"):
        proven(made(), attention=attention, isolate="packed")
    assert proven(made(), attention=attention).isolation.apart


@pytest.mark.parametrize(
    ("number", "worse", "isolation"),
    [
        (1, Difference(log_prob=1.0), OWN),
        (2, Difference(gradient=1.0), APART),
        (3, Difference(leak=1.0), APART),
        (2, Difference(error="out of memory"), APART),
    ],
    ids=["alone", "packed", "leak", "error"],
)
def test_ranks_act_on_the_worst_of_them(
    number: int, worse: Difference, isolation: Isolation, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Difference] = []

    def with_another_rank(action: Callable[[], Any]) -> list[Any]:
        mine = action()
        if isinstance(mine, Difference):
            asked.append(mine)  # of the noise, of samples alone, of packed ones and their leaks
        return [mine, worse if len(asked) == number + 1 else mine]

    monkeypatch.setattr(first_batch, "together", with_another_rank)
    assert proven(made()).isolation == isolation


def test_a_model_that_is_no_measure_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    broken, wrong = made(), made()
    broken.model.norm.weight.data[0] = float("nan")
    with pytest.raises(UserError, match="log-probabilities of the first samples aren't finite"):
        proven(broken)
    with_mlp(lambda hidden: hidden * len(hidden))(wrong, monkeypatch)
    with pytest.raises(UserError, match=r"llama computes a sample otherwise beside itself in a batch, by .*e"):
        proven(wrong)

    def missing(*_: object, **__: object) -> None:
        raise ImportError("install the kernel\nlike so")

    monkeypatch.setattr(wrong.model.layers[1], "forward", missing)
    with pytest.raises(UserError, match=r"fails by its own attention \(sdpa\) .*: ImportError: install the kernel$"):
        proven(wrong)


def test_a_model_that_draws_at_random_is_proven_in_evaluation_mode() -> None:
    model = made()
    mlp = Changed(model.model.layers[0].mlp, lambda hidden: hidden)
    mlp.change = lambda hidden: hidden * (torch.rand(hidden.shape) if mlp.training else 1)
    model.model.layers[0].mlp = mlp
    proof = proven(model)
    assert proof.isolation == PACKED and not proof.training_mode and "evaluation mode" in proof.said
    assert model.training and mlp.training


def test_weights_that_are_frozen() -> None:
    model = made().requires_grad_(False)
    assert proven(model).isolation == PACKED
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    assert proven(model).differences["packed"].gradient > 0
    assert not model.model.embed_tokens.weight.requires_grad


def test_bloom_has_its_own_attention() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2)
    model = BloomForCausalLM._from_config(config, attn_implementation="packed").train()
    proof = proven(model)
    assert proof.isolation == replace(OWN, attention="eager") and proof.reason and proof.reason.startswith("bloom ")


def test_the_slower_way_has_its_price() -> None:
    model, samples = made(), [torch.arange(16)] * 3
    prover = Prover(model, samples, "own", "auto", True, torch.float32, contextlib.nullcontext, (16.0, 256.0))
    assert 1 < (prover.prove().slower or 0) < 16
    assert replace(prover, per_pass=(1.0, 256.0)).prove().slower == 1


def test_a_model_that_reads_ahead_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    with_mlp(lambda hidden: hidden + 1e-3 * hidden.roll(-1, dims=-2))(model, monkeypatch)
    with pytest.raises(UserError, match=r"llama is no causal language model: .* tokens see those that follow"):
        proven(model)


def llama4(floor_scale: int) -> PreTrainedModel:
    """Its attention's temperature changes after so many tokens of a row."""
    config = Llama4TextConfig(
        vocab_size=264, hidden_size=32, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2, no_rope_layers=[1, 0],
        interleave_moe_layer_step=4, floor_scale=floor_scale, attn_scale=1.0, initializer_range=0.2, use_qk_norm=False,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return Llama4ForCausalLM._from_config(config, attn_implementation="packed").train()


def phi3(original: int) -> PreTrainedModel:
    """Its rotary embeddings are others if a sample of the row is longer."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        vocab_size=264, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4 * original, original_max_position_embeddings=original,
        rope_parameters=rope | {"original_max_position_embeddings": original}, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Phi3ForCausalLM._from_config(config, attn_implementation="packed").train()


# Of samples of 11, 7 and 9 tokens. The switch is at 40 tokens: of the row for Llama 4, of a sample for Phi-3.
LONG_ROWS = {
    "row": (llama4, (64, 30), True),
    "short row": (llama4, (40, 30), False),
    "sample": (phi3, (96, 50), True),
    "short sample": (phi3, (96, 30), False),
    "no room": (phi3, (38, 50), False),
}


@pytest.mark.parametrize("name", LONG_ROWS)
def test_what_depends_on_the_length_of_its_row_runs_apart(name: str) -> None:
    make, longest, differs = LONG_ROWS[name]
    proof = proven(make(40), longest=longest)
    assert ("long" in proof.differences) == (name != "no room")
    assert proof.isolation == (APART if differs else PACKED)
    assert ("depends on the length of its row (" in (proof.reason or "")) == differs
    if differs:
        with pytest.raises(UserError, match=r"model.isolate=packed: .* doesn't keep packed samples apart: .*long "):
            proven(make(40), longest=longest, isolate="packed")


def test_a_long_sample_changes_others_by_less_than_bf16_tells() -> None:
    model = phi3(40)
    model.model.rotary_emb.long_inv_freq = model.model.rotary_emb.original_inv_freq * 1.02
    proof = proven(model, torch.bfloat16, longest=(96, 50))
    found = proof.differences["long"]
    assert proof.isolation == APART and found.excess < 1 and found.leak > 0


def test_a_long_row_is_the_samples_after_others() -> None:
    samples = [torch.arange(3), torch.arange(5, 9)]  # 7 tokens
    row, cut = measured_pass.long_rows(samples, 20, 8)
    assert row["counts"][:, 0].tolist() == [8, 5, 3, 4] and cut["counts"][:, 0].tolist() == [4, 4, 5, 3, 4]
    assert row["input_ids"].tolist() == [[0, 1, 2, 5, 6, 7, 8, 0, 1, 2, 5, 6, 7, 0, 1, 2, 5, 6, 7, 8]]
    assert torch.equal(row["input_ids"], cut["input_ids"]) and row["max_seqlen"] == cut["max_seqlen"] == 8
    assert measured_pass.long_rows(samples, 11, 8) == measured_pass.long_rows(samples, 20, 4) == (None, None)


def test_what_a_layer_can_t_do_in_a_long_row_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(original: Any, query: Tensor, *others: Any) -> Tensor:
        if query.shape[2] > 20:
            raise attention.CannotPack("Layer hands a mask to its attention")
        return original(query, *others)

    with_attention(change)(model := made(), monkeypatch)
    proof = proven(model, longest=(64, 30))
    assert proof.isolation == APART and "its row (Layer hands a mask to its attention" in proof.reason


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError("x"), torch.OutOfMemoryError("x")], ids=repr)
def test_a_fault_of_this_project_s_code_is_raised(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty: dict[str, Any] = {"error": error}
    code = "def lengths(bounds):\n    if len(bounds) > 2:\n        raise error\n    return bounds.diff().tolist()"
    exec(compile(code, attention.__file__, "exec"), faulty)
    monkeypatch.setattr(attention, "_lengths", faulty["lengths"])
    with pytest.raises(type(error)):
        proven(made())
