"""Which parameters are trained, and how."""

from functools import partial

import pytest
import torch
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, GptOssConfig, GptOssForCausalLM

from conftest import tiny_llama
from made_up import SIZE
from sft.errors import UserError
from sft.model.optimizer import build
from sft.model.parameters import Parameters, decays

ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)


def decaying(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if decays(model, name, parameter)}


def test_biases_of_experts_and_norms_by_head_do_not_decay() -> None:
    # Of the shapes [experts, channels] and [heads, channels].
    with torch.device("meta"):
        experts = GptOssForCausalLM(GptOssConfig(**SIZE, num_local_experts=4, layer_types=["full_attention"] * 2))
        heads = CohereForCausalLM(CohereConfig(**SIZE, use_qk_norm=True))
    for model, matrices in ((experts, ("gate_up_proj", "down_proj")), (heads, ("q_proj.weight",))):
        names = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
        expected = {name for name in names if not name.endswith("bias") and "norm" not in name}
        assert decaying(model) == expected < names
        assert all(any(name.endswith(matrix) for name in expected) for matrix in matrices)


class StateSpace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.D = nn.Parameter(torch.zeros(4, 1))
        self.in_proj = nn.Linear(4, 4)
        self.own = nn.Parameter(torch.zeros(4, 4))
        self.own._no_weight_decay = True


def test_state_space_constants_and_what_its_author_flags_do_not_decay() -> None:
    assert decaying(StateSpace()) == {"in_proj.weight"}


def test_groups_of_patterns_have_rates_and_decays_of_their_own() -> None:
    lines: list[str] = []
    chosen = Parameters(
        groups=[
            {"match": "*embed*", "lr": 1e-5, "weight_decay": 0.0},
            {"match": "*.layers.0.*", "lr": 1e-4},
            {"match": "*.layers.*norm*", "weight_decay": 0.3},
        ]
    )
    groups = build(tiny_llama(), ADAMW, chosen, lines.append).param_groups
    # The default ones first: train/lr is the first group's.
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (1e-3, 0.1, 7),
        (1e-3, 0.0, 1),
        (1e-5, 0.0, 1),
        (1e-4, 0.1, 7),
        (1e-4, 0.0, 2),
        (1e-3, 0.3, 2),
    ]
    assert lines == [
        "optimizer: matrices: lr 0.001, weight decay 0.1, 9,216 parameters",
        "optimizer: vectors: lr 0.001, weight decay 0.0, 32 parameters",
        "optimizer: *embed*: lr 1e-05, weight decay 0.0, 8,448 parameters",
        "optimizer: *.layers.0.* matrices: lr 0.0001, weight decay 0.1, 9,216 parameters",
        "optimizer: *.layers.0.* vectors: lr 0.0001, weight decay 0.0, 64 parameters",
        "optimizer: *.layers.*norm*: lr 0.001, weight decay 0.3, 64 parameters",
    ]


def test_train_and_freeze() -> None:
    model = tiny_llama()
    Parameters(train=["*.layers.1.*", "model.norm.weight"], freeze=["*_proj.weight"]).choose(model)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == [
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    ]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"freeze": ["*.embd_tokens.weight"]},
            "parameters.freeze: *.embd_tokens.weight matches no parameter that is trained; near it are "
            "model.embed_tokens.weight",
        ),
        (
            {"train": ["*q_prj*"]},
            "parameters.train: *q_prj* matches no parameter that is trained; near it are "
            "model.layers.0.self_attn.q_proj.weight, model.layers.1.self_attn.q_proj.weight",
        ),
        (
            {"freeze": ["lm_head.*"]},
            "parameters.freeze: lm_head.* means lm_head.weight, which shares its weight with "
            "model.embed_tokens.weight: name that, or leave it out",
        ),
        ({"freeze": ["*"]}, "parameters.freeze leaves nothing to train: take a pattern out"),
        (
            {"groups": [{"match": "*"}, {"match": "*norm*", "lr": 1.0}]},
            "parameters.groups[1].match: *norm* matches no parameter that is trained; near it are none, since earlier "
            "patterns have them all",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_pattern_without_a_match_is_refused(settings: dict, line: str) -> None:
    def choose_and_build() -> None:
        model, chosen = tiny_llama(), Parameters(**settings)
        chosen.choose(model)
        build(model, ADAMW, chosen)

    with pytest.raises(UserError) as refused:
        choose_and_build()
    assert str(refused.value) == line
