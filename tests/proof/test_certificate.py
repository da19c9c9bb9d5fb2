from omegaconf import OmegaConf
from transformers import GPT2Config

from sft.proof.cells import Cell, CellResult
from sft.proof.certificate import Certificate
from sft.proof.excerpt import made_up


def test_page_of_a_family_with_names_of_its_own() -> None:
    model = GPT2Config(n_layer=3, n_embd=24, vocab_size=77, bos_token_id=0, eos_token_id=0).to_dict()
    assert "num_hidden_layers" not in model
    settings = {"trainer": {"gradient_clip_val": 1.0}}
    results = [CellResult(Cell("single", 1, 1, True, False, "sgd"), loss=0.0, grad_norm=0.0, weight=0.0)]
    certificate = Certificate(OmegaConf.create(settings), model, made_up(0, 16), {}, results, 1.0)
    assert "- model: `gpt2` with 3 layers of 24 channels and 77 tokens" in certificate.page()
