"""Tokenizers from a folder: read as their files mean it, or refused in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.settings import model_source

from sft.data.conversation import Conversation
from sft.data.mask import IGNORE, Tokenization
from sft.errors import UserError

WORDS = (
    *("the", "natural", "number", "of", "apples", "that", "Natalia", "sold", "in", "April", "and", "May"),
    *("altogether", "was", "seventy", "two,", "half", "as", "many"),
)
TEXTS = [" ".join([*WORDS[i:], *WORDS[:i], f"{i * 7}."]) for i in range(len(WORDS))]
IDENTITY: dict[str, Any] = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def sentencepiece_folder(folder: Path, config: dict[str, object] | None = None, **options: Any) -> str:
    """A folder with a tokenizer.model that was trained with these options, and nothing else but the config."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir()
    options = {"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, "hard_vocab_limit": False, **options}
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_prefix=str(folder / "tokenizer"), minloglevel=2, **options
    )
    (folder / "tokenizer.vocab").unlink()
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def load(folder: str) -> Any:
    return model_source(init="random", tokenizer=folder).load_tokenizer()


LLAMA_2 = {
    **{"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False},
    **{"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (None, IDENTITY),
        (LLAMA_2, IDENTITY),
        (None, {**IDENTITY, "model_type": "unigram"}),
        (None, {**IDENTITY, "model_type": "unigram", "add_dummy_prefix": False}),
    ],
    ids=["BPE alone", "like Llama 2's", "Unigram alone", "Unigram without the space"],
)
def test_a_tokenizer_model_alone_is_enough(
    tmp_path: Path, config: dict[str, object] | None, options: dict[str, Any]
) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = sentencepiece_folder(tmp_path / "model", config, **options)
    tokenizer = load(folder)
    model = SentencePieceProcessor(model_file=f"{folder}/tokenizer.model")
    for text in TEXTS[:5]:
        assert tokenizer(text, add_special_tokens=False).input_ids == model.encode(text)
    row = Conversation(prompt="the apples that ", response="Natalia sold in April.")
    (tokenized,) = Tokenization(tokenizer, max_length=200).batch([row])
    (sample,) = tokenized.samples
    assert tokenizer.decode(sample.input_ids, skip_special_tokens=True) == "the apples that Natalia sold in April."
    assert sample.labels[-1] == tokenizer.eos_token_id
    learned = [label for label in sample.labels[:-1] if label != IGNORE]
    assert tokenizer.decode(learned).strip() == "Natalia sold in April."


@pytest.mark.parametrize(
    "options", [{**IDENTITY, "model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}], ids=["Unigram", "NFKC"]
)
def test_a_tokenizer_class_that_reads_the_model_as_another_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = sentencepiece_folder(tmp_path / "model", LLAMA_2, **options)
    with pytest.raises(UserError, match=r"takes it for a LlamaTokenizer.*: remove tokenizer_class from"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"IQ== 0\nIg== 1\n", r"holds tiktoken's ranks, which lack the pattern .*: add the model's tokenizer\.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\n", "is a pointer of Git LFS.* git lfs pull"),
        (b"garbage", r"is no model of SentencePiece, or is damaged: add the model's tokenizer\.json"),
        (b"", r"is no model of SentencePiece, or is damaged"),
    ],
    ids=["tiktoken", "Git LFS", "garbage", "empty"],
)
def test_a_tokenizer_model_of_another_kind_is_named(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=line):
        load(str(tmp_path))


def test_a_slow_tokenizer_is_refused(tmp_path: Path) -> None:
    from sft.model.tokenizer import check

    class OwnTokenizer:
        is_fast = False

    with pytest.raises(UserError, match=r"is a OwnTokenizer, which can't say where .* with a tokenizer\.json"):
        check(OwnTokenizer(), "model")
