"""The plain loop's own numbers, which no code of the project gives."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft.proof import reference


def test_norm_of_the_gradient_is_that_in_float64(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 30_000, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    model.save_pretrained(tmp_path)
    ids = np.arange(40)
    optimizer = partial(torch.optim.SGD, lr=0.0)
    trained = reference.train(
        tmp_path, [[(ids, ids, np.ones(40, np.float32))]], optimizer, lambda step, num_steps: 1.0, clip=1.0
    )
    model = model.double()
    model(input_ids=torch.tensor(ids[None]), labels=torch.tensor(ids[None])).loss.backward()
    exact = torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()
    assert trained.grad_norms == pytest.approx([float(exact)], rel=2e-6)


def test_a_loop_is_moved_by_one_rounding_of_each_weight() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    reference.move(model, seed=0)
    for old, new in zip(before, model.parameters(), strict=True):
        up, down = (torch.nextafter(old, torch.full_like(old, end)) for end in (torch.inf, -torch.inf))
        assert ((new == up) | (new == down)).all()
        assert 0 < (new == up).sum() < new.numel()
