"""Compiled decoder layers make the same loss, in one graph for all layers and packs where the kernel takes them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kernel
import settings
from made_up import pack
from sft.model import varlen
from sft.model.attention import packed_attention
from sft.model.loss import nll
from sft.model.visible import Visible, visible

PACKS = [[5, 9, 9, 3, 17], [30], [4, 4, 12], [7] * 9]


def losses(model: nn.Module) -> list[tuple[float, Tensor]]:
    made = []
    for lengths in PACKS:
        model.zero_grad()
        total = nll(model, pack(lengths), plain_head=True)
        total.backward()
        made.append((total.item(), model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    return made


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of dynamo itself, as it looks at the layer's input
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_for_all_layers_and_packs(
    checkpointing: bool, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(varlen, "varlen_attn", kernel.varlen_attn)
    monkeypatch.setattr(varlen, "takes", lambda query, *_: varlen._has_flash_attention(query.device))
    # What a graph can't hold, as the driver's answer.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 + 0 * os.getpid(), 0))
    graphs = CompileCounterWithBackend("eager")
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: original(self, backend=graphs, **options))
    source = settings.model_source(path=str(model_folder), gradient_checkpointing=checkpointing)
    expected = losses(source.load(torch.float32))
    compiled = settings.model_source(path=str(model_folder), gradient_checkpointing=checkpointing, compile=True)
    made = losses(compiled.load(torch.float32))
    for (one, gradient), (other, expected_gradient) in zip(made, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    # Once more where checkpointing recomputes.
    assert graphs.frame_count <= 1 + checkpointing
    torch._dynamo.reset()


ROWS = (1, 4, 18, 8), (1, 2, 18, 8), (1, 2, 18, 8)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # by dynamo itself
@pytest.mark.parametrize("seen", [visible(), visible(window=3), visible(chunk=3)], ids=["causal", "window", "chunk"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
def test_a_layer_is_one_graph(seen: Visible, sinks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With sinks, the operations behind the kernel are stand-ins of the right shapes."""
    torch._dynamo.reset()
    monkeypatch.setattr(varlen, "varlen_attn", kernel.varlen_attn)
    monkeypatch.setattr(varlen, "takes", lambda *_: True)

    def forward(query: Tensor, *others: Any, **_: Any) -> tuple[Tensor, ...]:
        out = query * others[2].numel()
        return out, query.float().sum(-1).T, out, out, out

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        return grad * query, key * grad.sum(), value * grad.sum()

    monkeypatch.setattr(varlen, "forward", forward)
    monkeypatch.setattr(varlen, "backward", backward)
    bounds = torch.tensor([0, 3, 8, 13, 14, 18], dtype=torch.int32)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, requires_grad=True) for shape in [*ROWS, (4,)]]
    used = tensors if sinks else tensors[:3]

    def layer(query: Tensor, key: Tensor, value: Tensor, mask: Visible, *sink: Tensor) -> Tensor:
        options: dict[str, Any] = {"cu_seq_lens_q": bounds, "max_length_q": 5, "s_aux": sink[0] if sink else None}
        return packed_attention(module, query, key, value, mask, **options)[0]

    module = nn.Module()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    outs = [each(*tensors[:3], seen, *used[3:]) for each in (layer, compiled)]
    torch.testing.assert_close(*outs)
    gradients = [torch.autograd.grad(out.square().sum(), used) for out in outs]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
