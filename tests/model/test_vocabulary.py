"""Added tokens: ids in the tokenizer, and rows of embeddings and head that begin as the mean of the others."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import settings
from conftest import tiny_llama
from made_up import OneRank
from sft.errors import UserError

MANY = [f"<new{number}>" for number in range(7)]  # ids 259 to 265, of which the model has 264


def folder(path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool) -> str:
    torch.manual_seed(1)
    tiny_llama(tie_word_embeddings=tied).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tokens", [MANY, MANY[:2]], ids=["grown", "room"])
def test_new_rows_are_the_mean_of_the_old_ones_however_the_model_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, tied: bool, tokens: list[str]
) -> None:
    plain = settings.model_source(path=folder(tmp_path, tokenizer, tied))
    source = settings.model_source(path=str(tmp_path), add_tokens=tokens)
    extended, bare = source.load_tokenizer(), plain.load_tokenizer()
    assert extended.convert_tokens_to_ids(tokens) == list(range(259, 259 + len(tokens)))
    ids = extended.encode(f"a{tokens[0]}b", add_special_tokens=False)
    assert ids == [*bare.encode("a"), 259, *bare.encode("b")]
    assert extended.decode(ids, skip_special_tokens=True) == f"a{tokens[0]}b"
    rows = 320 if len(tokens) > 5 else 264
    assert source.load_config().vocab_size == rows
    assert source.check(extended, 512).vocab_size == rows and source.check_weights() == []
    old: Any = plain.load(torch.float32)
    new = [row for row in range(259, rows) if row < 259 + len(tokens) or row >= 264]
    kept = [row for row in range(264) if row not in new]
    for model in (source.load(torch.float32), source.load(torch.float32, sharding=OneRank())):
        for before, after in (
            (old.lm_head.weight.detach(), model.lm_head.weight.detach()),
            (old.model.embed_tokens.weight.detach(), model.model.embed_tokens.weight.detach()),
        ):
            assert after.shape == (rows, 32)
            assert torch.equal(after[kept], before[kept])
            assert torch.allclose(after[new], before[kept].mean(0).expand(len(new), -1), atol=1e-7)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert model.config.vocab_size == rows
    empty = source.load(torch.float32, weights=False)
    assert empty.lm_head.weight.shape == (rows, 32)


def test_tokens_that_are_there_and_adapters(model_folder: Path) -> None:
    source = settings.model_source(path=str(model_folder), add_tokens=["<|im_end|>", "a"])
    assert source.new_ids == [] and source.load_config().vocab_size == 264
    with pytest.raises(UserError, match=r"model.add_tokens: an adapter leaves the rows of new tokens"):
        settings.model_source(path=str(model_folder), add_tokens=MANY, adapter=settings.adapter())


def test_an_adapter_trains_the_new_rows_or_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = folder(tmp_path, tokenizer, tied=False)

    def load(modules: list[str], sharded: bool = False) -> Any:
        adapter = settings.adapter(modules_to_save=modules)
        source = settings.model_source(path=path, add_tokens=MANY, adapter=adapter)
        return source.load(torch.float32, sharding=OneRank() if sharded else None)

    with pytest.raises(
        UserError, match=r"model.embed_tokens.weight has rows .*modules_to_save=\[embed_tokens,lm_head\]"
    ):
        load(["lm_head"])
    whole, sharded = load(["embed_tokens", "lm_head"]), load(["embed_tokens", "lm_head"], sharded=True)
    for (name, one), other in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert whole.lm_head.modules_to_save.default.weight.shape == (320, 32)
