from io import StringIO

from omegaconf import OmegaConf
from rich.console import Console
from transformers import GPT2Config

from sft.proof.cells import Cell, CellResult, all_cells
from sft.proof.certificate import Certificate
from sft.proof.excerpt import made_up


def test_page_of_a_family_with_names_of_its_own() -> None:
    model = GPT2Config(n_layer=3, n_embd=24, vocab_size=77, bos_token_id=0, eos_token_id=0).to_dict()
    assert "num_hidden_layers" not in model
    settings = {"trainer": {"gradient_clip_val": 1.0}}
    results = [CellResult(Cell("single", 1, 1, True, False, "sgd"), loss=0.0, grad_norm=0.0, weight=0.0)]
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
