"""The loss against computations that share nothing with it: plain logits, no mask, no packing, by hand."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedModel

from conftest import tiny_llama
from made_up import NUM_PROMPT, pack
from sft.data.labels import IGNORE
from sft.model import attention, loss
from sft.model.inputs import model_inputs
from sft.model.loss import Objective, head_is_plain_matrix, linear_nll, nll, token_log_probs

LENGTHS = [5, 9, 9, 3, 17]


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_llama(attn_implementation=attention.NAME)


def samples(batch: dict) -> list[Tensor]:
    return [batch["input_ids"][:, start:end] for start, end in pairwise(batch["cu_seqlens"].tolist())]


def log_prob(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """log Pr(tokens after the first | the first), by the chain rule over plain logits in double precision."""
    logits = model(ids, use_cache=False).logits.double()[0, :-1]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum()


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights under transformers' own attention."""
    config = type(model.config)(**{**model.config.to_dict(), "attn_implementation": "eager"})
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    return other


def test_masked_sum_is_joint_minus_prompt(model: PreTrainedModel) -> None:
    # log Pr(y | x) = log Pr([x, y]) - log Pr(x), the right side without any mask.
    batch = pack(LENGTHS)
    total = nll(model, batch, plain_head=True)
    other = plain(model)
    expected = sum(log_prob(other, ids) - log_prob(other, ids[:, :NUM_PROMPT]) for ids in samples(batch))
    assert total.item() == pytest.approx(-expected.item(), rel=1e-6, abs=1e-5)


def test_gradient_of_pack_is_sum_over_samples_alone(model: PreTrainedModel) -> None:
    batch = pack(LENGTHS)
    nll(model, batch, plain_head=True).backward()
    other = plain(model)
    for ids in samples(batch):
        logits = other(ids, use_cache=False).logits[0, NUM_PROMPT - 1 : -1]
        F.cross_entropy(logits, ids[0, NUM_PROMPT:], reduction="sum").backward()
    expected = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("plain_head", [True, False])
def test_token_log_probs_sum_to_the_joint(plain_head: bool, model: PreTrainedModel) -> None:
    batch = pack(LENGTHS)
    log_probs = token_log_probs(model, batch, plain_head=plain_head)
    other = plain(model)
    for (start, end), ids in zip(pairwise(batch["cu_seqlens"].tolist()), samples(batch), strict=True):
        assert log_probs[start] == 0
        assert log_probs[start:end].sum().item() == pytest.approx(log_prob(other, ids).item(), abs=1e-4)


@pytest.mark.parametrize("leak", [{"use_cache": True}, {"attention_mask": torch.ones(1, sum(LENGTHS))}])
def test_what_would_let_samples_see_each_other(model: PreTrainedModel, leak: dict) -> None:
    # Why `model_inputs` has no cache and no mask: with transformers' own attention either leaks without a word.
    batch = pack(LENGTHS)
    other = plain(model)
    inputs = model_inputs(model, batch)
    isolated = other(**inputs).logits
    leaking = other(**{**inputs, **leak}).logits
    alone = torch.cat([other(ids, use_cache=False).logits for ids in samples(batch)], dim=1)
    torch.testing.assert_close(isolated, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(leaking, alone, atol=1e-2)


def test_gradient_by_hand() -> None:
    # Two rows, hidden width 1, vocabulary 2: logits (h, -h). With p = sigmoid(2h) the probability of token 0,
    #   d(-log p)/dh     = -(1 - p) w_0 + (1 - p) w_1 = -2 (1 - p)        for target 0, w = (1, -1)
    #   d(-log p)/dw_v   = (softmax_v - [v = target]) h
    hidden = torch.tensor([[0.5], [-1.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    total = linear_nll(hidden, weight, torch.tensor([0, 0]))
    (3 * total).backward()
    p = torch.sigmoid(torch.tensor([1.0, -2.0]))
    assert total.item() == pytest.approx(-p.log().sum().item())
    torch.testing.assert_close(hidden.grad[:, 0], 3 * -2 * (1 - p))
    by_row = (1 - p) * torch.tensor([0.5, -1.0])
    torch.testing.assert_close(weight.grad[:, 0], 3 * torch.stack([-by_row.sum(), by_row.sum()]))


def test_weighted_gradient_by_hand() -> None:
    # As above, with a third row. Each row's term, and so its gradient, is multiplied by its own weight.
    hidden = torch.tensor([[0.5], [-1.0], [2.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weights = torch.tensor([0.25, 4.0, 0.0])
    total = linear_nll(hidden, weight, torch.tensor([0, 0, 1]), weights)
    (3 * total).backward()
    p = torch.sigmoid(torch.tensor([1.0, -2.0]))
    assert total.item() == pytest.approx(-(0.25 * p[0].log() + 4 * p[1].log()).item())
    torch.testing.assert_close(hidden.grad[:2, 0], 3 * -2 * weights[:2] * (1 - p))
    assert hidden.grad[2, 0] == 0
    by_row = weights[:2] * (1 - p) * torch.tensor([0.5, -1.0])
    torch.testing.assert_close(weight.grad[:, 0], 3 * torch.stack([-by_row.sum(), by_row.sum()]))


def with_weights(batch: dict) -> dict:
    """The same with weights from 0.25 to 3, whose mean isn't 1."""
    generator = torch.Generator().manual_seed(2)
    return batch | {"weights": 0.25 + 2.75 * torch.rand(len(batch["predicting"]), generator=generator)}


@pytest.mark.parametrize("plain_head", [True, False])
def test_weighted_pack_is_its_samples_alone(plain_head: bool, model: PreTrainedModel) -> None:
    batch = with_weights(pack(LENGTHS))
    total = nll(model, batch, plain_head=plain_head)
    total.backward()
    other, expected = plain(model), 0.0
    of_samples = batch["weights"].split([length - NUM_PROMPT for length in LENGTHS])
    for ids, weights in zip(samples(batch), of_samples, strict=True):
        log_probs = other(ids, use_cache=False).logits[0, NUM_PROMPT - 1 : -1].log_softmax(-1)
        term = -(weights * log_probs.gather(1, ids[0, NUM_PROMPT:, None])[:, 0]).sum()
        term.backward()
        expected += term.item()
    assert total.item() == pytest.approx(expected, rel=1e-6)
    of_other = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, of_other[name].grad, rtol=1e-4, atol=4e-5, msg=name)


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_equal_weights_are_a_factor(plain_head: bool, dtype: torch.dtype | None, model: PreTrainedModel) -> None:
    results = []
    for weight in (None, 1.0, 2.0):
        batch = pack(LENGTHS)
        batch["weights"] = None if weight is None else torch.full((len(batch["predicting"]),), weight)
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            total = nll(model, batch, plain_head=plain_head)
        total.backward()
        results.append([total.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    none, one, two = results
    for without, ones, twos in zip(none, one, two, strict=True):
        torch.testing.assert_close(ones, without, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(twos, 2 * ones, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weighted", [True, False])
def test_chunks_change_nothing(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(100, 8), torch.randn(50, 8), torch.randint(0, 50, (100,))
    weights = torch.rand(100) if weighted else None
    results = []
    for elements in (1, 10**9):  # at least 16 rows: 7 chunks, the last of 4; then one
        monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", elements)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = linear_nll(h, w, target, weights)
        total.backward()
        results.append((total.detach(), h.grad, w.grad))
    terms = F.cross_entropy(hidden @ weight.T, target, reduction="none")
    reference = (terms if weights is None else terms * weights).sum()
    torch.testing.assert_close(results[0][0], reference)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_frozen_head_gets_no_gradient() -> None:
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear_nll(hidden, weight, torch.tensor([0, 1, 2])).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_no_supervised_token_gives_zero_and_a_graph(model: PreTrainedModel) -> None:
    # A rank with nothing to learn must still run backward, or the others wait for its collectives.
    batch = pack([4])
    batch["labels"][:] = IGNORE
    batch["predicting"] = batch["predicting"][:0]
    total = nll(model, batch, plain_head=True)
    total.backward()
    assert total.item() == 0.0
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    "other",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, attn_implementation=attention.NAME)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0, attn_implementation=attention.NAME)),
    ],
    ids=["soft-capped", "scaled"],
)
def test_head_that_is_more_than_a_matrix_takes_the_models_own_forward(other: object) -> None:
    torch.manual_seed(0)
    model = other()  # type: ignore[operator]
    batch = pack(LENGTHS)
    batch["input_ids"] %= 64
    batch["labels"] = torch.where(batch["labels"] == IGNORE, IGNORE, batch["input_ids"])
    plain_head = head_is_plain_matrix(model)
    total = nll(model, batch, plain_head=plain_head)
    reference = plain(model)
    expected = sum(log_prob(reference, ids) - log_prob(reference, ids[:, :NUM_PROMPT]) for ids in samples(batch))
    assert not plain_head
    assert total.item() == pytest.approx(-expected.item(), abs=1e-4)


def in_place(model: PreTrainedModel) -> None:
    """The head's product is changed after it, in place."""
    forward = model.forward

    def changed(*args: object, **kwargs: object) -> object:
        outputs = forward(*args, **kwargs)
        outputs.logits.mul_(2)
        return outputs

    model.forward = changed


def test_head_is_found_plain_without_reading_a_weight(model: PreTrainedModel) -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        empty = tiny_llama(attn_implementation=attention.NAME)
    for one in (model, empty):
        assert head_is_plain_matrix(one)
        assert one.training
        assert "forward" not in vars(one.base_model) | vars(one.get_output_embeddings())
    assert torch.equal(torch.get_rng_state(), state)
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(264))
    assert not head_is_plain_matrix(model)
    in_place(empty)
    assert not head_is_plain_matrix(empty)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("adds", [Objective(0.1, 0.0), Objective(0.0, 0.02), Objective(0.1, 0.02)], ids=str)
def test_smoothing_and_z_loss_against_autograd(
    adds: Objective, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 1)  # chunks of 16 rows
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(50, 8), torch.randn(40, 8) * 2, torch.randint(0, 40, (50,))
    weights = torch.rand(50) if weighted else None
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    parts = linear_nll(h, w, target, weights, adds)
    (3 * parts.sum()).backward()
    # The formula, and its gradients by autograd, in double precision.
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h64 @ w64.T
    log_p = logits.log_softmax(-1)
    of_target = -log_p.gather(1, target[:, None])[:, 0]
    smoothed = (1 - adds.label_smoothing) * of_target + adds.label_smoothing * -log_p.mean(-1)
    z = adds.z_loss * logits.exp().sum(-1).log() ** 2
    scale = torch.ones(50) if weights is None else weights
    expected = (scale * torch.stack([of_target, smoothed - of_target, z])).sum(1)
    (3 * expected.sum()).backward()
    torch.testing.assert_close(parts.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h.grad.double(), h64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_models_own_head_adds_the_same(model: PreTrainedModel) -> None:
    batch, adds = pack(LENGTHS), Objective(0.1, 0.01)
    batch["weights"] = torch.rand(len(batch["predicting"]))
    results = []
    for plain_head in (True, False):
        model.zero_grad()
        parts = nll(model, batch, plain_head=plain_head, objective=adds)
        parts.sum().backward()
        results.append([parts.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert results[0][0].min() > 0.01
    # The first part is what is measured without.
    torch.testing.assert_close(results[0][0][0], nll(model, batch, plain_head=True).detach(), rtol=1e-6, atol=0)
    assert nll(model, batch, plain_head=True, objective=Objective()).ndim == 0
