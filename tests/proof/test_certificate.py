from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from rich.console import Console
from transformers import GPT2Config

from sft.proof import cells
from sft.proof.cells import NUM_STEPS, Cell, CellResult, Outcome, all_cells, compare
from sft.proof.certificate import Certificate
from sft.proof.excerpt import made_up
from sft.proof.reference import Reference

CELL = Cell("single", 1, 1, True, False, "sgd")


def test_page_of_a_family_with_names_of_its_own() -> None:
    model = GPT2Config(n_layer=3, n_embd=24, vocab_size=77, bos_token_id=0, eos_token_id=0).to_dict()
    assert "num_hidden_layers" not in model
    settings = {"trainer": {"gradient_clip_val": 1.0}}
    results = [CellResult(CELL, loss=0.0, grad_norm=0.0, weight=0.0)]
    certificate = Certificate(OmegaConf.create(settings), model, made_up(0, 16), {}, results, 1.0)
    assert "- model: `gpt2` with 3 layers of 24 channels and 77 tokens" in certificate.page()


def test_in_a_log_each_row_names_its_strategy_and_the_page_each_cell_that_fails() -> None:
    model = GPT2Config(n_layer=3, n_embd=24, vocab_size=77, bos_token_id=0, eos_token_id=0).to_dict()
    settings = OmegaConf.create({"trainer": {"gradient_clip_val": 1.0}})
    results = [CellResult(cell, loss=6e-7, grad_norm=4.3e-6, weight=0.12, seconds=1.0) for cell in all_cells()]
    certificate = Certificate(settings, model, made_up(0, 16), {}, results, 1.0)
    log = Console(file=StringIO(), width=80)  # as where there is no terminal
    certificate.show(log)
    assert isinstance(log.file, StringIO)
    rows = [line.split() for line in log.file.getvalue().splitlines()]
    assert [row[:3] for row in rows[1:17]] == [
        [strategy, str(ranks), "0/29"] for ranks, strategy in dict.fromkeys(cell.group for cell in all_cells())
    ]
    assert all(
        f"\n- {cell}: loss off by 6.0e-07, weights by 1.2e-01\n" in certificate.page()
        for cell in (results[0].cell, results[-1].cell)
    )


@pytest.mark.parametrize(
    ("weight", "rounding", "passed", "may_be_rounding"),
    [
        (1e-6, 0.0, True, False),
        (3e-6, 0.0, False, True),  # to be measured
        (3e-6, 1e-6, True, False),
        (4e-6, 1e-6, True, False),
        (4.1e-6, 1e-6, False, False),  # further off than rounding takes it, which is known now
        (1e-6, 1e-9, True, False),  # no tolerance is lowered
        (9e-6, 1e-3, True, False),
        (1.1e-5, 1e-3, False, False),  # whatever rounding does
        (1.1e-5, 0.0, False, False),
        (float("nan"), 0.0, False, False),
    ],
)
def test_a_cell_passes_within_four_roundings_and_the_largest_tolerance(
    weight: float, rounding: float, passed: bool, may_be_rounding: bool
) -> None:
    result = CellResult(CELL, loss=0.0, grad_norm=0.0, weight=weight, rounding=rounding)
    assert (result.passed, result.may_be_rounding) == (passed, may_be_rounding)


def test_no_rounding_excuses_a_loss_an_error_or_bf16() -> None:
    result = CellResult(CELL, loss=0.0, grad_norm=0.0, weight=3e-6)
    in_bf16 = replace(CELL, precision="bf16-mixed")
    others = (replace(result, loss=2e-5), replace(result, error="broken"), replace(result, cell=in_bf16, weight=2.0))
    assert result.may_be_rounding
    assert not any(other.passed or other.may_be_rounding for other in others)


def test_a_rounding_measured_for_one_group_is_known_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"w": np.array([1.0], np.float32)}
    reference = Reference([0.0] * NUM_STEPS, [0.0] * NUM_STEPS, weights, movement=1.0, change=1.0, averages={})

    def checkpoint(path: Path) -> Any:
        tensor = torch.tensor([1.0 + 3e-6])
        return SimpleNamespace(shapes={"w": [1]}, has_average=False, tensor=lambda *_: tensor)

    monkeypatch.setattr(cells, "Checkpoint", checkpoint)
    outcome = Outcome([0.0] * NUM_STEPS, [0.0] * NUM_STEPS, Path())
    unknown = compare(CELL, outcome, reference)
    known = compare(CELL, outcome, replace(reference, rounding=1e-6))
    assert unknown.may_be_rounding and not unknown.passed
    assert known.rounding == 1e-6 and known.passed


def test_the_page_says_where_rounding_raised_a_tolerance() -> None:
    model = GPT2Config(n_layer=3, n_embd=24, vocab_size=77, bos_token_id=0, eos_token_id=0).to_dict()
    settings = OmegaConf.create({"trainer": {"gradient_clip_val": 1.0}})
    result = CellResult(CELL, loss=0.0, grad_norm=0.0, weight=5e-6, rounding=1.75e-6)
    pages = [
        Certificate(settings, model, made_up(0, 16), {}, [replace(result, rounding=rounding)], 1.0).page()
        for rounding in (1.75e-6, 1e-9)
    ]
    assert "|7e-06 " in pages[0] and "|1e-06 " in pages[1]
    raised = "\n\nThe tolerance of 1 cell was raised, to at most 7e-06: 4 times what moving each first weight"
    assert raised in pages[0] and "raised" not in pages[1]
