import shutil
from pathlib import Path

import pytest
import torch

import settings
from conftest import tiny_llama
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


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for options, line in (
        ({"path": "nowhere/at/all"}, f"model.path=nowhere/at/all: there is no such folder (looked in {Path.cwd()})"),
        (
            {"path": "m", "tokenizer": str(tmp_path / "none")},
            f"model.tokenizer={tmp_path}/none: there is no such folder (looked in {Path.cwd()})",
        ),
        (
            {"path": str(tmp_path / "bare")},
            f"the folder {tmp_path}/bare holds no tokenizer (tokenizer.json, tokenizer_config.json): set "
            "model.tokenizer to the folder or Hub name of the one that the model was trained with",
        ),
    ):
        with pytest.raises(UserError) as refused:
            settings.model_source(**options).load_tokenizer()
        assert str(refused.value) == line
    with pytest.raises(UserError, match=r"^the tokenizer some/model can't be loaded: We couldn't connect to"):
        settings.model_source(path="some/model").load_tokenizer()


def test_a_chat_template_that_is_not_there(model_folder: Path) -> None:
    with pytest.raises(UserError, match=r"^model.chat_template=none.jinja can't be read: No such file or directory$"):
        settings.model_source(path=str(model_folder), chat_template="none.jinja").load_tokenizer()


def test_a_tokenizer_and_a_length_that_do_not_fit_the_model(model_folder: Path, tmp_path: Path) -> None:
    source = settings.model_source(path=str(model_folder))
    tokenizer = source.load_tokenizer()
    assert source.check(tokenizer, max_length=512).vocab_size == 264
    with pytest.raises(UserError) as refused:
        source.check(tokenizer, max_length=513)
    assert str(refused.value) == (
        f"data.max_length=513 is more than the 512 positions of {model_folder}: set data.max_length=512 or less"
    )
    tiny_llama(vocab_size=100).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        settings.model_source(path=str(tmp_path), tokenizer=str(model_folder)).check(tokenizer, max_length=512)
    assert str(refused.value) == (
        f"the tokenizer {model_folder} has token ids up to 258, the model {tmp_path} only 100 embeddings: set "
        "model.tokenizer to the one that the model was trained with"
    )


def test_weights_that_are_torn(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path, dirs_exist_ok=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UserError, match="can't be loaded: Error while deserializing header"):
        settings.model_source(path=str(tmp_path)).load(torch.float32)
