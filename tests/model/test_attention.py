import inspect
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.model import attention, varlen
from sft.model.attention import packed_attention
from sft.model.visible import CannotPack, visible

LENGTHS = [3, 5, 5, 1, 4]


def qkv(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 4, sum(LENGTHS), 8), (1, 2, sum(LENGTHS), 8), (1, 2, sum(LENGTHS), 8)]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def boundaries(device: str = "cpu") -> dict:
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32, device=device)
    return {"cu_seq_lens_q": bounds, "max_length_q": max(LENGTHS)}


SINKS = [0.5, -1.0, 2.0, 0.0]


def attend(rows: list[Tensor], device: str = "cpu", **options: Any) -> Tensor:
    """Our attention of these rows; options as `by_hand` has them."""
    seen = visible(options.pop("window", None), options.pop("chunk", None))
    if options.pop("sinks", False):
        options["s_aux"] = torch.tensor(SINKS, device=device)
    out, weights = packed_attention(torch.nn.Module(), *rows, seen, **boundaries(device), **options)
    assert weights is None
    return out


def by_hand(
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    scaling: float = 8**-0.5,
    sinks: bool = False,
) -> torch.Tensor:
    """Every score of every sample, one at a time."""
    query, key, value = (x[0].double() for x in qkv())
    outs, start = [], 0
    for length in LENGTHS:
        for at in range(start, start + length):
            first = start if window is None else max(start, at - window + 1)
            first = first if chunk is None else at - (at - start) % chunk
            heads = []
            for head in range(4):
                scores = key[head // 2, first : at + 1] @ query[head, at] * scaling
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp() / (scores.exp().sum() + (math.exp(SINKS[head]) if sinks else 0))
                heads.append(weights @ value[head // 2, first : at + 1])
            outs.append(torch.stack(heads))
        start += length
    return torch.stack(outs)[None].float()


OPTIONS: list[dict[str, Any]] = [{}, {"scaling": 0.1}, {"window": 2}, {"chunk": 2}, {"chunk": 3}]
OPTIONS += [{"sinks": True}, {"sinks": True, "window": 2}, {"sinks": True, "chunk": 3, "scaling": 0.1}]


@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 0.5}, {"softcap": 0.5, "window": 2, "sinks": True}], ids=str)
def test_each_sample_by_itself(options: dict) -> None:
    torch.testing.assert_close(attend(qkv(), **options), by_hand(**options), rtol=1e-5, atol=1e-5)


CAUSAL = visible()


class Attention(torch.nn.Module):
    is_causal = True


def refused(*, module: torch.nn.Module | None = None, mask: Any = CAUSAL, **changes: Any) -> str:
    with pytest.raises(CannotPack) as error:
        packed_attention(module or Attention(), *changes.pop("rows", qkv()), mask, **(boundaries() | changes))
    return str(error.value)


def test_nothing_is_guessed() -> None:
    assert "one flat row with boundaries" in refused(cu_seq_lens_q=None)
    assert "one flat row with boundaries" in refused(max_length_q=None)  # a window would be lost
    query, key, value = qkv()
    assert "one flat row with boundaries" in refused(rows=[torch.cat([row, row]) for row in qkv()])
    longer = [torch.cat([row, row], dim=2) for row in (key, value)]  # as of DeepSeek-V4's compressed keys
    assert "one flat row with boundaries" in refused(rows=[query, *longer])
    assert "a mask of its own, or none" in refused(mask=None)
    assert "a mask of its own, or none" in refused(mask=torch.ones(1, 1, 18, 18))
    assert "a mask of its own, or none" in refused(is_causal=False)
    both_ways = Attention()
    both_ways.is_causal = False
    assert "a mask of its own, or none" in refused(module=both_ways)
    assert "a sliding window of 3, and one of 2 by its mask" in refused(mask=visible(window=2), sliding_window=3)
    assert "a sliding window of 3, and one of None by its mask" in refused(sliding_window=3)
    assert "one of 0 by its mask" in refused(mask=visible(window=0))
    assert "Attention hands position_bias to its attention" in refused(position_bias=torch.zeros(1, 4, 18, 18))
    assert "Attention hands indices to its attention" in refused(indices=torch.zeros(1, 18, 2, dtype=torch.int32))


def test_what_says_nothing_is_passed_over() -> None:
    others = {"position_ids": torch.arange(18)[None], "cu_seq_lens_k": torch.tensor([0]), "position_bias": None}
    out, _ = packed_attention(
        Attention(),
        *qkv(),
        visible(window=2),
        **boundaries(),
        sliding_window=2,
        is_causal=True,
        use_cache=False,
        **others,
    )
    torch.testing.assert_close(out, by_hand(window=2), rtol=1e-5, atol=1e-5)


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
    assert query.dtype in (torch.bfloat16, torch.float16)
    takes(query, key, value, bounds, longest, grouped)
    outs = []
    for start, end in pairwise(bounds.tolist()):
        if end > start:
            rows = (row[start:end].transpose(0, 1).double() for row in (query, key, value))
            allowed = seen_within(end - start, *window)
            outs.append(F.scaled_dot_product_attention(*rows, attn_mask=allowed, scale=scale, enable_gqa=True))
    return torch.cat(outs, dim=1).transpose(0, 1).to(query.dtype)


def takes(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, grouped: bool) -> None:
    width = query.shape[-1]
    assert query.dtype == key.dtype == value.dtype
    assert key.shape == value.shape and key.shape[-1] == width
    assert width % 8 == 0 and width <= 256 and not 192 < width <= 224
    assert grouped or query.shape[1] == key.shape[1]
    assert {row.stride(-1) for row in (query, key, value)} == {1}
    assert bounds.dtype == torch.int32 and longest == int(bounds.diff().max()) and bounds.diff().min() >= 0
    assert bounds[0] == 0 and bounds[-1] == len(query)


def seen_within(length: int, left: int, right: int) -> Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= -right if right >= 0 else True) & (distance <= left if left >= 0 else distance == distance)


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


def flash_forward(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    """torch's operation behind the kernel, by the one for the processor: results and log Σ exp(score) [H, T]."""
    assert cum_seq_q is cum_seq_k and max_q == max_k and dropout_p == 0 and not return_debug_mask
    assert is_causal == (window_size_left == -1) and window_size_right == 0
    takes(query, key, value, cum_seq_q, max_q, grouped=True)
    outs, sums = [], []
    for start, end in pairwise(cum_seq_q.tolist()):
        if end > start:
            rows = one_sample(start, end, query, key, value)
            mask = seen_within(end - start, window_size_left, 0)
            found = FORWARD(*rows, 0.0, False, attn_mask=torch.where(mask, 0.0, -math.inf), scale=scale)
            outs.append(found[0][0])
            sums.append(found[1][0])
    unused = torch.empty(0)
    return torch.cat(outs, 1).transpose(0, 1).to(query.dtype), torch.cat(sums, -1).float(), unused, unused, unused


def flash_backward(  # type: ignore[no-untyped-def]
    grad_out,
    query,
    key,
    value,
    out,
    logsumexp,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    rng_state,
    unused,
    *,
    scale,
    window_size_left,
    window_size_right,
):
    assert out.dtype == query.dtype and logsumexp.dtype == torch.float32 and logsumexp.shape == out.shape[1::-1]
    grads = []
    for start, end in pairwise(cum_seq_q.tolist()):
        if end > start:
            grad, *rows, result = one_sample(start, end, grad_out, query, key, value, out)
            mask = torch.where(seen_within(end - start, window_size_left, 0), 0.0, -math.inf)
            sums = logsumexp[None, :, start:end]
            sample = BACKWARD(grad, *rows, result, sums, 0.0, False, attn_mask=mask, scale=scale)
            grads.append([row[0].transpose(0, 1) for row in sample])
    whole = zip((query, key, value), map(torch.cat, zip(*grads, strict=True)), strict=True)
    return tuple(row.unflatten(1, (like.shape[1], -1)).sum(2).to(like.dtype) for like, row in whole)


def one_sample(start: int, end: int, *rows: Tensor) -> list[Tensor]:
    """[1, H, length, D] in fp32, of as many heads each."""
    heads = max(row.shape[1] for row in rows)
    return [row[start:end].float().transpose(0, 1).repeat_interleave(heads // row.shape[1], 0)[None] for row in rows]


FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@pytest.fixture(params=[of_2_10, of_2_11, of_2_12], ids=lambda kernel: kernel.__name__)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """CUDA's path on the processor, by a stand-in for the kernel of each torch."""
    monkeypatch.setattr(varlen, "varlen_attn", request.param)
    monkeypatch.setattr(varlen, "KERNEL_OPTIONS", frozenset(inspect.signature(request.param).parameters))
    monkeypatch.setattr(varlen, "forward", flash_forward)
    monkeypatch.setattr(varlen, "backward", flash_backward)
    takes = varlen.takes

    class Cuda(Tensor):
        is_cuda = True

    def as_on_cuda(query: Tensor, *others: object) -> bool:
        return takes(query.as_subclass(Cuda), *others)

    monkeypatch.setattr(varlen, "takes", as_on_cuda)
    monkeypatch.setattr(varlen, "_has_flash_attention", lambda device: True)
    monkeypatch.setattr(attention, "_lengths", None)  # the other path
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_kernel_makes_the_same(kernel: Callable, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    if kernel is of_2_10 and "window" in options:
        monkeypatch.undo()  # has none: a call for each sample
    found = attend(qkv(dtype=torch.bfloat16), **options)
    torch.testing.assert_close(found.float(), by_hand(**options), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [each for each in OPTIONS if "sinks" in each], ids=str)
def test_gradients_with_sinks_are_exact(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "forward", flash_forward)
    monkeypatch.setattr(varlen, "backward", flash_backward)
    rows = [row.requires_grad_() for row in [*qkv(), torch.tensor(SINKS)]]
    bounds, window, chunk = boundaries()["cu_seq_lens_q"], options.get("window"), options.get("chunk")
    scale = options.get("scaling", 8**-0.5)
    found = varlen.attend(*rows[:3], bounds, max(LENGTHS), scale, window, chunk, rows[3])
    exact, _ = packed_attention(
        Attention(), *rows[:3], visible(window, chunk), **boundaries(), scaling=scale, s_aux=rows[3]
    )
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    weight = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((each * weight).sum(), rows) for each in (exact, found)]
    for one, other in zip(*gradients, strict=True):
        assert one.norm() > 0.1
        assert (one - other).norm() <= 1e-6 * one.norm()


@pytest.mark.parametrize("window", [None, 4])
def test_operations_behind_the_kernel_take_what_they_get(window: int | None) -> None:
    """torch's own, which tell shapes without a device."""
    shapes = [(10, 4, 8), (10, 2, 8), (10, 2, 8)]
    rows = [torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    sink = torch.empty(4, device="meta", requires_grad=True)
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    out = varlen._WithSinks.apply(*rows, sink, bounds, 7, 0.3, window)
    assert out.shape == shapes[0] and out.dtype == torch.bfloat16
    out.sum().backward()
    assert [row.grad.shape for row in rows] == shapes and sink.grad.shape == (4,)


@pytest.mark.parametrize(
    ("lengths", "chunk", "expected"),
    [
        ([3, 5, 5, 1, 4], 3, [0, 3, 6, 8, 11, 13, 14, 17, 18]),
        ([4, 4], 4, [0, 4, 8]),
        ([9], 2, [0, 2, 4, 6, 8, 9]),
        ([1, 1, 1], 2, [0, 1, 2, 3]),
        ([2, 1, 6], 5, [0, 2, 3, 8, 9]),
    ],
)
def test_boundaries_of_chunks(lengths: list[int], chunk: int, expected: list[int]) -> None:
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    cut = varlen.cut_bounds(bounds, max(lengths), chunk, sum(lengths))
    assert cut.dtype == torch.int32 and sorted(set(cut.tolist())) == expected == cut.tolist()[: len(expected)]
    assert len(cut) <= len(bounds) + sum(lengths) // chunk


@pytest.mark.parametrize(("width", "value_width"), [(8, 8), (12, 12), (80, 80), (24, 16), (192, 128), (200, 200)])
def test_kernel_with_heads_of_any_width(kernel: Callable, width: int, value_width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = (4, width), (2, width), (2, value_width)
    shapes = [(1, heads, sum(LENGTHS), each) for heads, each in widths]
    rows = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    exact = packed_attention_by_sample(*rows)
    out = attend([row.bfloat16() for row in rows])
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
        out = attend([query, key, value.bfloat16()])
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
    attend(rows, **options)
    assert asked


def test_signature_is_one_of_these() -> None:
    from torch.nn.attention.varlen import varlen_attn

    known = [set(inspect.signature(each).parameters) for each in (of_2_10, of_2_11, of_2_12)]
    assert set(inspect.signature(varlen_attn).parameters) in known


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_kernel(options: dict) -> None:
    here = attend(qkv("cuda", torch.bfloat16), "cuda", **options)
    torch.testing.assert_close(here.float().cpu(), by_hand(**options), rtol=2e-2, atol=2e-2)
