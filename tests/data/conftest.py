"""Tokenizers whose ids can be read off a list, templates that do what those in the wild do, and data settings."""

from typing import Any

from omegaconf import OmegaConf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sft.config import CONF
from sft.data.dataset import DataConfig

# fmt: off
SPECIAL = [
    "<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|call|>", "<|tool|>",
    #  0       1       2         3            4              5             6          7           8
]
WORDS = ["\n", " ", "hi", "yes", "why", "so", "be", "good", "hmm", "add"]
#         9    10    11    12     13     14    15     16     17     18
# fmt: on

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def word_tokenizer(
    template: str | None = CHAT, *, before: str = "", after: str = "", **options: object
) -> PreTrainedTokenizerFast:
    """A word, a space, a newline or a mark is a token: ids as above. The tokenizer puts the special tokens
    `before` and `after` around a text."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|."), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if before or after:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{before} $A {after}".strip(),
            special_tokens=[(token, vocabulary[token]) for token in (before, after) if token],
        )
    settings = {
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
        **options,
    }
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings)


def byte_tokenizer(merges: list[tuple[str, str]], template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's and Qwen's; offsets are trimmed of spaces, as theirs are."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|assistant|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=template)


def metaspace_tokenizer(
    pieces: list[str], template: str | None = None, *, prepend_scheme: str = "first"
) -> PreTrainedTokenizerFast:
    """SentencePiece, as Llama 2's: a space is part of the piece after it, and a text begins with a space of
    the tokenizer's own; under the scheme "always", what follows a special token does so too."""
    special = ["<unk>", "<s>", "</s>"]
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in [*special, *pieces]], unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend_scheme)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def data_config(**changes: Any) -> DataConfig:
    """The settings of conf/data/base.yaml with these changes."""
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / "data" / "base.yaml"), resolve=True)
    del settings["_target_"]
    return DataConfig(**settings | changes)
