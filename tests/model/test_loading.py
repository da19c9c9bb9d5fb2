from pathlib import Path

import pytest
import torch

import settings
from sft.errors import UserError


def test_loads_lazily_in_training_mode_with_overrides(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder), config={"attention_dropout": 0.25})
    model = source.load(torch.float32)
    assert model.training  # from_pretrained alone leaves it in evaluation mode
    assert model.config._attn_implementation == "packed"
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_without_weights_it_is_the_same_model_otherwise(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder))
    full, empty = source.load(torch.float32), source.load(torch.float32, weights=False)
    assert {name: t.shape for name, t in full.named_parameters()} == {
        name: t.shape for name, t in empty.named_parameters()
    }
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert not torch.equal(full.lm_head.weight, empty.lm_head.weight)
    for (name, buffer), own in zip(full.named_buffers(), empty.buffers(), strict=True):
        assert torch.equal(buffer, own), name


def test_bf16_keeps_the_rotary_frequencies_in_fp32(model_folder: Path) -> None:
    model = settings.model_source(path=str(model_folder)).load(torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "set model.path"),
        ({"init": "zeros"}, "set pretrained or random"),
        ({"init": "random"}, "needs model.tokenizer"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.model_source(**options)  # type: ignore[arg-type]


def test_chat_template_from_a_file(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text("{{ messages[0].content }}")
    source = settings.model_source(path=str(model_folder), chat_template=str(tmp_path / "template.jinja"))
    assert source.load_tokenizer().chat_template == "{{ messages[0].content }}"
