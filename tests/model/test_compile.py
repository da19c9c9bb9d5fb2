"""Compiled decoder layers make the same loss, in one graph for all layers and packs where the kernel takes them."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kernel
import settings
from made_up import pack
from sft.model import varlen
from sft.model.loss import nll

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
