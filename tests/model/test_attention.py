import inspect
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.errors import UserError
from sft.model import attention
from sft.model.attention import packed_attention

LENGTHS = [3, 5, 5, 1, 4]


def qkv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, sum(LENGTHS), 8), (1, 2, sum(LENGTHS), 8), (1, 2, sum(LENGTHS), 8)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def boundaries(device: str = "cpu") -> dict:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}


def by_hand(window: int | None = None, softcap: float | None = None, scaling: float = 8**-0.5) -> torch.Tensor:
    """Every score of every sample, one at a time."""
    query, key, value = (x[0].double() for x in qkv())
    outs, start = [], 0
    for length in LENGTHS:
        for at in range(start, start + length):
            first = start if window is None else max(start, at - window + 1)
            heads = []
            for head in range(4):
                scores = key[head // 2, first : at + 1] @ query[head, at] * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                heads.append(scores.softmax(0) @ value[head // 2, first : at + 1])
            outs.append(torch.stack(heads))
        start += length
    return torch.stack(outs)[None].float()


@pytest.mark.parametrize(
    "options",
    [{}, {"scaling": 0.1}, {"sliding_window": 2}, {"softcap": 0.5}, {"softcap": 0.5, "sliding_window": 2}],
    ids=str,
)
def test_each_sample_by_itself(options: dict) -> None:
    out, weights = packed_attention(torch.nn.Module(), *qkv(), None, **boundaries(), **options)
    named = {"window" if name == "sliding_window" else name: value for name, value in options.items()}
    torch.testing.assert_close(out, by_hand(**named), rtol=1e-5, atol=1e-5)
    assert weights is None


def test_without_boundaries_it_refuses_to_guess() -> None:
    with pytest.raises(AssertionError):
        packed_attention(torch.nn.Module(), *qkv(), None)
    with pytest.raises(AssertionError):
        packed_attention(torch.nn.Module(), *qkv(), torch.ones(1), **boundaries())


def test_sinks_are_refused() -> None:
    with pytest.raises(UserError, match="attention sinks"):
        packed_attention(torch.nn.Module(), *qkv(), None, **boundaries(), s_aux=torch.zeros(4))


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float | None,
    window: tuple[int, int],
    grouped: bool,
) -> Tensor:
    """What the kernel computes, and what it refuses (flash_api.cpp of torch 2.10 to 2.13)."""
    width = query.shape[-1]
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.bfloat16, torch.float16)
    assert key.shape == value.shape and key.shape[-1] == width
    assert width % 8 == 0 and width <= 256 and not 192 < width <= 224
    assert grouped or query.shape[1] == key.shape[1]
    assert {row.stride(-1) for row in (query, key, value)} == {1}
    assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max())
    left, right = window
    outs = []
    for start, end in pairwise(bounds.tolist()):
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        allowed = (distance >= -right if right >= 0 else True) & (
            distance <= left if left >= 0 else distance == distance
        )
        rows = (row[start:end].transpose(0, 1).double() for row in (query, key, value))
        outs.append(F.scaled_dot_product_attention(*rows, attn_mask=allowed, scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=1).transpose(0, 1).to(query.dtype)


# The signatures of torch.nn.attention.varlen.varlen_attn.


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    assert cu_seq_q is cu_seq_k and max_q == max_k and is_causal
    return flash(query, key, value, cu_seq_q, max_q, None, (-1, 0), grouped=False)


def of_2_11(  # type: ignore[no-untyped-def]
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return flash(query, key, value, cu_seq_q, max_q, scale, window_size, grouped=False)


def of_2_12(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    assert cu_seq_q is cu_seq_k and max_q == max_k
    return flash(query, key, value, cu_seq_q, max_q, scale, window_size, grouped=enable_gqa)


@pytest.fixture(params=[of_2_10, of_2_11, of_2_12], ids=lambda kernel: kernel.__name__)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """CUDA's path on the processor, by a stand-in for the kernel of each torch."""
    monkeypatch.setattr(attention, "varlen_attn", request.param)
    monkeypatch.setattr(attention, "KERNEL_OPTIONS", frozenset(inspect.signature(request.param).parameters))
    takes = attention._kernel_takes

    class Cuda(Tensor):
        is_cuda = True

    def as_on_cuda(query: Tensor, *others: object) -> bool:
        return takes(query.as_subclass(Cuda), *others)

    monkeypatch.setattr(attention, "_kernel_takes", as_on_cuda)
    monkeypatch.setattr(attention, "_has_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "_lengths", None)  # the other path
    return request.param


@pytest.mark.parametrize("options", [{}, {"scaling": 0.1}, {"sliding_window": 2}], ids=str)
def test_kernel_makes_the_same(kernel: Callable, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel is of_2_10 and "sliding_window" in options:
        monkeypatch.undo()  # has none: a call for each sample
    rows = qkv(dtype=torch.bfloat16)
    out, _ = packed_attention(torch.nn.Module(), *rows, None, **boundaries(), **options)
    named = {"window" if name == "sliding_window" else name: value for name, value in options.items()}
    torch.testing.assert_close(out.float(), by_hand(**named), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (12, 12), (80, 80), (24, 16), (192, 128), (200, 200)])
def test_kernel_with_heads_of_any_width(kernel: Callable, width: int, value_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = (4, width), (2, width), (2, value_width)
    shapes = [(1, heads, sum(LENGTHS), each) for heads, each in widths]
    rows = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    exact = packed_attention_by_sample(*rows)
    out, _ = packed_attention(torch.nn.Module(), *(row.bfloat16() for row in rows), None, **boundaries())
    assert out.shape == (1, sum(LENGTHS), 4, value_width)
    torch.testing.assert_close(out.float(), exact, rtol=2e-2, atol=2e-2)
    gradients = [torch.autograd.grad(each.float().square().sum(), rows) for each in (exact, out)]
    for one, other in zip(*gradients, strict=True):
        assert (one - other).norm() < 2e-2 * one.norm()


def packed_attention_by_sample(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    outs, start = [], 0
    for length in LENGTHS:
        rows = (row[:, :, start : start + length] for row in (query, key, value))
        outs.append(F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True))
        start += length
    return torch.cat(outs, dim=2).transpose(1, 2)


def test_kernel_under_autocast(kernel: Callable) -> None:
    query, key, value = qkv()  # as rotary embeddings leave them: queries and keys in fp32
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = packed_attention(torch.nn.Module(), query, key, value.bfloat16(), None, **boundaries())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_hand(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("options", "dtype", "width"),
    [
        ({"softcap": 0.5}, torch.bfloat16, 8),
        ({"dropout": 0.1}, torch.bfloat16, 8),
        ({}, torch.float32, 8),
        ({}, torch.bfloat16, 264),
    ],
    ids=str,
)
def test_what_the_kernel_does_not_do_goes_by_sample(
    kernel: Callable, options: dict, dtype: torch.dtype, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(attention, "_lengths", lambda bounds: asked.append(1) or LENGTHS)
    rows = [torch.randn(1, heads, sum(LENGTHS), width, dtype=dtype) for heads in (4, 2, 2)]
    packed_attention(torch.nn.Module(), *rows, None, **boundaries(), **options)
    assert asked


def test_signature_is_one_of_these() -> None:
    from torch.nn.attention.varlen import varlen_attn

    known = [set(inspect.signature(each).parameters) for each in (of_2_10, of_2_11, of_2_12)]
    assert set(inspect.signature(varlen_attn).parameters) in known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"scaling": 0.1}, {"sliding_window": 2}], ids=str)
def test_varlen_kernel(options: dict) -> None:
    here = packed_attention(torch.nn.Module(), *qkv("cuda", torch.bfloat16), None, **boundaries("cuda"), **options)[0]
    named = {"window" if name == "sliding_window" else name: value for name, value in options.items()}
    torch.testing.assert_close(here.float().cpu(), by_hand(**named), rtol=2e-2, atol=2e-2)
