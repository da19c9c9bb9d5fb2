"""What is measured at supervised tokens against plain logits of single samples, and the loss to the bit."""

from itertools import pairwise

import pytest
import torch

from conftest import tiny_llama
from made_up import NUM_PROMPT, pack
from sft.model import attention, loss
from sft.model.loss import nll
from sft.model.token_measures import measured_nll

LENGTHS = [5, 9, 9, 3, 17, 30]
STOPS = torch.tensor([17, 258])


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
def test_the_loss_is_the_same_to_the_bit_and_tokens_are_as_of_single_samples(
    dtype: torch.dtype | None, plain_head: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cpu", 1)  # chunks of 16 rows
    torch.manual_seed(0)
    model = tiny_llama(attn_implementation=attention.NAME, initializer_range=0.3)
    batch = pack(LENGTHS)
    if weighted:
        batch["weights"] = torch.rand(len(batch["predicting"]))
    batch["fixed"] = torch.tensor([0, 1, 5, 40, 41, *range(43, 60)])
    kept: dict[int, torch.Tensor] = {}

    def at_fixed(log_probs: torch.Tensor, first: int) -> None:
        kept.update(enumerate(log_probs, first))

    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        expected = nll(model, batch, plain_head=plain_head)
        total, alone = measured_nll(model, batch, STOPS, plain_head=plain_head)
        again, measured = measured_nll(model, batch, STOPS, plain_head=plain_head, at_fixed=at_fixed)
    assert total == expected == again
    assert torch.equal(alone, measured)
    if dtype is not None:
        return
    plain_model = tiny_llama(attn_implementation="eager")
    plain_model.load_state_dict(model.state_dict())
    bounds = batch["cu_seqlens"].tolist()
    logits = [plain_model(batch["input_ids"][:, a:b], use_cache=False).logits[0].double() for a, b in pairwise(bounds)]
    log_probs = torch.cat(logits).log_softmax(-1)
    of_responses = torch.cat([each[NUM_PROMPT - 1 : -1] for each in log_probs.split(LENGTHS)])
    target = torch.cat([batch["input_ids"][0, a + NUM_PROMPT : b] for a, b in pairwise(bounds)])
    best = of_responses.argmax(-1)
    plain = [
        -of_responses.gather(1, target[:, None])[:, 0],
        (best == target).double(),
        of_responses[:, STOPS].exp().sum(-1),
        torch.isin(best, STOPS).double(),
    ]
    torch.testing.assert_close(measured.double(), torch.stack(plain), rtol=1e-4, atol=1e-5)
    assert measured[1].sum() >= 1 and measured[2].max() > 0.02
    found = torch.stack([kept[number] for number in range(len(batch["fixed"]))])
    torch.testing.assert_close(found.double(), log_probs[batch["fixed"]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plain_head", [True, False])
def test_a_batch_without_supervised_tokens_has_none(plain_head: bool) -> None:
    batch = pack([4])
    batch["predicting"], batch["fixed"] = batch["predicting"][:0], batch["predicting"][:0]
    model = tiny_llama(attn_implementation=attention.NAME)
    total, measured = measured_nll(model, batch, STOPS, plain_head=plain_head, at_fixed=lambda *_: None)
    assert total == 0 and measured.shape == (4, 0)
