import pytest
import torch

from sft.errors import UserError
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("options", [{}, {"scaling": 0.1}, {"sliding_window": 2}], ids=str)
def test_varlen_kernel(options: dict) -> None:
    here = packed_attention(torch.nn.Module(), *qkv("cuda", torch.bfloat16), None, **boundaries("cuda"), **options)[0]
    named = {"window" if name == "sliding_window" else name: value for name, value in options.items()}
    torch.testing.assert_close(here.float().cpu(), by_hand(**named), rtol=2e-2, atol=2e-2)
