"""What transformers' masks allow is what is read from them, and nothing else is taken for it."""

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, masking_utils
from transformers.masking_utils import (
    create_bidirectional_mask,
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)

from conftest import tiny_llama
from made_up import pack
from sft.model.attention import packed_attention
from sft.model.loss import nll
from sft.model.visible import NAME, CannotPack, make_mask, visible

MADE = {
    "causal": (create_causal_mask, visible()),
    "sliding": (create_sliding_window_causal_mask, visible(window=3)),
    "chunked": (create_chunked_causal_mask, visible(chunk=4)),
}


def ask(create: Callable, attention: str = NAME, **options: Any) -> Any:
    config = AutoConfig.for_model("llama", sliding_window=3, attention_chunk_size=4, is_causal=True)
    config._attn_implementation = attention
    given = {"attention_mask": None, "cache": None, "position_ids": torch.arange(9)[None]}
    return create(config, torch.zeros(1, 9, 2), **(given | options))


@pytest.mark.parametrize("kind", MADE)
def test_read_is_what_transformers_masks(kind: str) -> None:
    create, expected = MADE[kind]
    assert ask(create) is expected
    mask = ask(create, "sdpa", allow_is_causal_skip=False)[0, 0]
    bounds = {"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32), "max_length_q": 9}
    # Equal scores and the unit vectors as values: a token's output is what it sees.
    zeros, values = torch.zeros(1, 1, 9, 9), torch.eye(9)[None, None]
    out, _ = packed_attention(torch.nn.Module(), zeros, zeros, values, expected, **bounds)
    assert torch.equal(out[0, :, 0] > 0, mask)
    assert not torch.equal(mask, ask(MADE["causal"][0], "eager")[0, 0] == 0) or kind == "causal"


def everything(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query >= 0


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask, create_chunked_causal_mask])
@pytest.mark.parametrize(
    "options",
    [
        {"or_mask_function": everything},
        {"and_mask_function": everything},
        {"block_sequence_ids": torch.full((1, 9), -1)},
        {"attention_mask": torch.ones(1, 9)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_any_other_mask_is_an_error(create: Callable, options: dict[str, Any]) -> None:
    with pytest.raises(CannotPack, match="neither causal nor sliding nor chunked"):
        ask(create, **options)


def test_attention_to_both_sides_is_an_error() -> None:
    with pytest.raises(CannotPack):
        ask(create_bidirectional_mask)


def test_a_function_of_the_same_name_is_an_error() -> None:
    def causal_mask_function(batch: object, head: object, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query >= 0

    causal_mask_function.__qualname__ = "causal_mask_function"
    with pytest.raises(CannotPack):
        make_mask(mask_function=causal_mask_function)


def test_a_size_that_is_another_is_an_error() -> None:
    with pytest.raises(CannotPack):
        make_mask(mask_function=masking_utils.sliding_window_causal_mask_function(3), local_size=4)


@pytest.mark.parametrize(
    "compute",
    [
        lambda mask: torch.zeros(2) + mask,
        lambda mask: mask + torch.zeros(2),
        lambda mask: torch.zeros(2).masked_fill(mask, 0),
        lambda mask: torch.where(mask, 0.0, 1.0),
        lambda mask: mask == 0,
        lambda mask: mask != 0,
        lambda mask: torch.zeros(2) * mask,
        lambda mask: 1 - mask,
        lambda mask: mask > 0,
        lambda mask: mask[:, 0],
        lambda mask: mask[0],
        lambda mask: list(mask),
        operator.invert,
        operator.not_,
        bool,
        len,
    ],
)
def test_computing_with_it_fails(compute: Callable) -> None:
    with pytest.raises(TypeError):
        compute(visible(window=3))


def test_cut_to_the_keys_it_is_the_same() -> None:
    assert visible(window=3)[:, :, :, :9] is visible(window=3)
    assert visible(chunk=3)[..., :9] == visible(chunk=3)
    assert visible(chunk=3) != visible(window=3)
    with pytest.raises(AttributeError):
        _ = visible().dtype  # type: ignore[attr-defined]


@pytest.mark.parametrize(("attention", "guesses"), [(NAME, 0), ("sdpa", 1)])
def test_boundaries_are_not_guessed(attention: str, guesses: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    guess = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda ids: asked.append(1) or guess(ids))
    model = tiny_llama(attn_implementation=attention)
    if attention == NAME:
        nll(model, pack([5, 7]), plain_head=True)
    else:
        model(input_ids=torch.zeros(1, 5, dtype=torch.int64), use_cache=False)
    assert len(asked) == guesses
