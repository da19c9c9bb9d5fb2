"""Models are called with what they take: old ones that don't choose positions, recurrent ones that take boundaries."""

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from made_up import NUM_PROMPT, SIZE, pack
from sft.model.attention import NAME as PACKED
from sft.model.head import chooses_positions, head_is_plain_matrix
from sft.model.inputs import model_inputs, recurrent_boundaries
from sft.model.isolation import Isolation, one_by_one, own_attention, use_attention
from sft.model.loss import nll, token_log_probs
from sft.model.token_measures import measured_nll

LENGTHS = [5, 9, 17]
NUM_TOKENS = sum(LENGTHS)
DECODER = {
    "vocab_size": 264,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 64,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "OpenAIGPT": {"vocab_size": 264, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "XLM": {"vocab_size": 264, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "causal": True},
    "Mamba": {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "TrOCR": DECODER | {"d_model": 32},
    "xLSTM": {"vocab_size": 264, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "chunk_size": 8}
    | {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "FalconH1": SIZE | MAMBA | {"mamba_d_ssm": 32},
    "KimiLinear": SIZE
    | {"num_key_value_heads": 4, "linear_num_heads": 4, "linear_head_dim": 8, "num_local_experts": 4}
    | {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "moe_intermediate_size": 16}
    | {"num_experts_per_tok": 2, "layer_types": ["linear_attention", "full_attention"]}
    | {"mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Qwen3VL": SIZE,
}


def made(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = {"OpenAIGPT": "OpenAIGPTLMHeadModel", "XLM": "XLMWithLMHeadModel"}.get(name, f"{name}ForCausalLM")
    config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
    model: PreTrainedModel = getattr(transformers, kind)(config).eval()
    use_attention(model, own_attention(model))
    return model


@pytest.mark.parametrize("name", ["OpenAIGPT", "XLM", "Mamba", "TrOCR", "xLSTM"])
def test_old_families_are_a_plain_loop(name: str) -> None:
    model, batch = made(name), pack(LENGTHS)
    plain_head = head_is_plain_matrix(model)
    assert chooses_positions(model) == (name not in ("TrOCR", "xLSTM"))
    parts = Isolation(own_attention(model), apart=True).parts(batch)  # type: ignore[arg-type]
    total = sum(nll(model, part, plain_head=plain_head) for part in parts)
    total.backward()  # type: ignore[union-attr]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    found: list[Tensor] = []
    for part in parts:
        part["fixed"] = torch.tensor([0, 2])
        keep = lambda log_probs, _: found.extend(log_probs)  # noqa: E731
        assert measured_nll(model, part, torch.tensor([3]), plain_head=plain_head, at_fixed=keep)[0] == nll(
            model, part, plain_head=plain_head
        )
    model.zero_grad()
    expected, fixed = 0.0, []
    for part in parts:
        ids = part["input_ids"]
        logits = model(ids, use_cache=False).logits[0]
        fixed += [*logits[[0, 2]].detach().log_softmax(-1)]
        term = F.cross_entropy(logits[NUM_PROMPT - 1 : -1], ids[0, NUM_PROMPT:], reduction="sum")
        term.backward()
        expected += term.item()
        whole = token_log_probs(model, part, plain_head=plain_head).sum().item()
        assert whole == pytest.approx(-F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item(), rel=1e-5)
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(torch.stack(found), torch.stack(fixed), rtol=1e-4, atol=1e-4)
    of_loop = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == of_loop.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_loop[name], rtol=1e-4, atol=2e-5, msg=name)


def test_boundaries_are_given_where_the_code_takes_them() -> None:
    model, batch = made("FalconH1"), pack([2, 1, 3])
    use_attention(model, PACKED)
    assert recurrent_boundaries(model) == ["seq_idx"]
    given = model_inputs(model, batch)["seq_idx"]  # type: ignore[arg-type]
    assert isinstance(given, Tensor) and given.dtype == torch.int32 and given.tolist() == [[0, 0, 1, 2, 2, 2]]
    # Without kernels their code refuses boundaries, of which one sample has none.
    assert "seq_idx" not in model_inputs(model, one_by_one(batch)[0])  # type: ignore[arg-type]
    use_attention(model, own_attention(model))
    with pytest.raises(AssertionError, match="doesn't keep samples apart"):
        model_inputs(model, batch)  # type: ignore[arg-type]
    assert set(model_inputs(model, one_by_one(batch)[0])) == {"input_ids", "use_cache"}  # type: ignore[arg-type]


def by_sample(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a kernel that takes boundaries does, by the torch code for one sample."""

    def each(*args: Any, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, **kwargs: Any) -> Any:
        if cu_seqlens is None:
            assert seq_idx is not None
            cu_seqlens = F.pad(torch.bincount(seq_idx[0]).cumsum(0), (1, 0))

        def cut(value: Any, start: int, end: int) -> Any:
            if not (isinstance(value, Tensor) and NUM_TOKENS in value.shape):
                return value
            return value.narrow(value.shape.index(NUM_TOKENS), start, end - start)

        outs = []
        for start, end in pairwise(cu_seqlens.tolist()):
            named = {name: cut(value, start, end) for name, value in kwargs.items()}
            outs.append((function(*(cut(value, start, end) for value in args), **named), end - start))
        if outs[0][0] is None:
            return None
        tuples = isinstance(outs[0][0], tuple)
        firsts = [out[0] if tuples else out for out, _ in outs]
        joined = torch.cat(firsts, dim=firsts[0].shape.index(outs[0][1], 1))
        return (joined, None) if tuples else joined

    return each


@pytest.mark.parametrize("name", ["FalconH1", "KimiLinear"])
def test_with_kernels_that_read_boundaries_hybrids_are_packed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = made(name), pack(LENGTHS)
    plain_head = head_is_plain_matrix(model)
    expected = [token_log_probs(model, part, plain_head=plain_head) for part in one_by_one(batch)]  # type: ignore[arg-type]
    use_attention(model, PACKED)
    with pytest.raises(ValueError, match="can't keep packed sequences apart without"):
        token_log_probs(model, batch, plain_head=plain_head)  # type: ignore[arg-type]
    code = sys.modules[type(model).__module__]
    for key, value in list(vars(code).items()):
        if callable(value) and hasattr(value, "__wrapped__") and any(w in key for w in ("conv1d", "scan", "delta")):
            monkeypatch.setattr(code, key, by_sample(value))
    packed = token_log_probs(model, batch, plain_head=plain_head)  # type: ignore[arg-type]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-4, atol=2e-5)


def test_positions_of_three_rows() -> None:
    config = transformers.Qwen3VLConfig(
        text_config=SIZE | {"head_dim": 8, "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "intermediate_size": 32},
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    batch = pack(LENGTHS)
    use_attention(model, own_attention(model))
    expected = [token_log_probs(model, part, plain_head=False) for part in one_by_one(batch)]  # type: ignore[arg-type]
    use_attention(model, PACKED)
    packed = token_log_probs(model, batch, plain_head=False)  # type: ignore[arg-type]
    torch.testing.assert_close(packed, torch.cat(expected), rtol=1e-4, atol=2e-5)
