from functools import partial

import pytest
import torch

from conftest import tiny_llama
from sft.errors import UserError
from sft.model.optimizer import build, clip, constant, cosine, linear, warmup_stable_decay


def test_matrices_decay_and_vectors_do_not() -> None:
    model = tiny_llama()
    optimizer = build(model, partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1))
    decay, rest = optimizer.param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert all("norm" not in name for name in decay["param_names"])
    assert all("norm" in name for name in rest["param_names"])
    # Tied: the embedding once, and every parameter in one group.
    assert len(decay["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_llama()
    model.model.embed_tokens.weight.requires_grad_(False)
    optimizer = build(model, partial(torch.optim.SGD, lr=1.0))
    assert all("embed" not in name for group in optimizer.param_groups for name in group["param_names"])


class Norms(torch.optim.SGD):
    """Steps by a share of each parameter's norm."""

    def step(self, closure: object = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data -= group["lr"] * parameter.grad / parameter.grad.norm()


class Listed(torch.optim.SGD):
    """Keeps what isn't a number."""

    def step(self, closure: object = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["history"] = [1.0]


class OfAll(torch.optim.SGD):
    """Keeps what belongs to no parameter."""

    def step(self, closure: object = None) -> None:
        self.state["all"] = {"step": 1}


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (torch.optim.Adafactor, "its state row_var is neither a number nor shaped like its parameter"),
        (Listed, "its state history is neither"),
        (OfAll, "its state all is neither"),
        (torch.optim.LBFGS, "can't step on a matrix without a closure|refuses its settings: LBFGS doesn't support"),
    ],
)
def test_what_can_not_be_saved_or_stepped_is_found_before_the_first_step(kind: type, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(tiny_llama(), partial(kind, lr=1e-3))


def test_what_needs_whole_matrices_is_refused_where_they_are_sharded() -> None:
    build(tiny_llama(), partial(Norms, lr=1e-3))
    with pytest.raises(UserError, match="Norms needs all values of a matrix together, and this strategy shards them"):
        build(tiny_llama(), partial(Norms, lr=1e-3), sharded=True)
    for usual in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Adam, torch.optim.NAdam, torch.optim.RMSprop):
        build(tiny_llama(), partial(usual, lr=1e-3), sharded=True)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 2 of warm-up (1/3, 2/3), then 8.
        (
            partial(cosine, warmup=2),
            [1 / 3, 2 / 3, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806],
        ),
        (partial(linear, warmup=2), [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (partial(linear, warmup=0, final=0.5), [1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]),
        (partial(constant, warmup=0.2), [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        (partial(warmup_stable_decay, warmup=2, decay=4), [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
    ],
    ids=["cosine", "linear", "linear to half", "constant", "warm-up stable decay"],
)
def test_schedules(schedule: object, expected: list[float]) -> None:
    factors = [schedule(step, 10) for step in range(10)]  # type: ignore[operator]
    assert factors == pytest.approx(expected, abs=1e-5)


def test_norm_of_a_large_gradient_is_exact_on_a_processor() -> None:
    layer = torch.nn.Linear(3_000, 1_000, bias=False)
    layer.weight.grad = torch.randn(3_000, 1_000).mul_(1e-3).t()
    exact = layer.weight.grad.double().norm()
    norm, _ = clip(layer, 0.1, by_value=False)
    assert float(norm) == pytest.approx(float(exact), rel=2e-6)  # torch's own: 6e-5, and 2e-2 of 155 million values
    assert float(layer.weight.grad.double().norm()) == pytest.approx(0.1, rel=2e-6)


def test_clipping_by_value_returns_the_norms_and_the_largest_value() -> None:
    layer = torch.nn.Linear(2, 1)
    layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, -4.0]]), torch.tensor([0.5])
    norm, clipped = clip(layer, 1.0, by_value=True)
    assert clipped is not None
    assert (float(norm), clipped.tolist()) == pytest.approx((25.25**0.5, [(1 + 1 + 0.25) ** 0.5, 4.0]))
    assert (layer.weight.grad.tolist(), layer.bias.grad.tolist()) == ([[1.0, -1.0]], [0.5])
