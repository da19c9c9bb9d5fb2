"""A tokenizer, from its folder or the Hub: read as its files mean it, or refused in a line that says what is amiss."""

import binascii
import re
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

KNOWN = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SIGNS = "It's 12,  345.\nA-B (c)?"  # that tokenizers read in different ways
NUM_WORDS = 300


def is_there(source: str) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((Path(source).expanduser() / name).exists() for name in KNOWN)


def check_files(source: str) -> None:
    """Refuses a folder without a tokenizer, or with a tokenizer.model alone that can't be read."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        return
    if not is_there(source):
        raise UserError(
            f"the folder {source} holds no tokenizer ({', '.join(KNOWN[:2])}): set model.tokenizer to the "
            "folder or Hub name of the one that the model was trained with"
        )
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        _check_alone(folder / "tokenizer.model")


def _check_alone(file: Path) -> None:
    advice = "add the model's tokenizer.json, or set model.tokenizer to a folder or Hub name that has one"
    try:
        with file.open("rb") as stream:
            first = stream.readline(1000)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if first.startswith(b"version https://git-lfs"):
        raise UserError(f"{file} is a pointer of Git LFS, not the file: fetch it with git lfs pull")
    if _is_ranks(first):
        raise UserError(
            f"{file} holds tiktoken's ranks, which lack the pattern that splits a text and the special tokens: {advice}"
        )
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise UserError(f"{file} needs the package {error.name}: pip install sentencepiece protobuf") from error
    try:
        SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is no model of SentencePiece, or is damaged: {advice}") from error


def _is_ranks(line: bytes) -> bool:
    """Whether this is a line of a tiktoken file: a token in base64, and its rank."""
    try:
        return bool(re.fullmatch(rb"\S+ \d+\s*", line)) and bool(binascii.a2b_base64(line.split()[0], strict_mode=True))
    except ValueError:
        return False


def check(tokenizer: Any, source: str) -> "PreTrainedTokenizerFast":
    """The tokenizer, if it is fast and reads as its tokenizer.model does; UserError otherwise."""
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer {source} is a {name}, which can't say where in a text its tokens are: set model.tokenizer "
            "to a folder or Hub name of the same tokenizer with a tokenizer.json"
        )
    file = Path(source).expanduser() / "tokenizer.model"
    if file.exists() and not file.with_name("tokenizer.json").exists() and (differing := _differing(tokenizer, file)):
        text, ours, its = differing
        raise UserError(
            f"{file} reads {text!r} as {its}, and transformers, which takes it for a {name}, as {ours}: remove "
            "tokenizer_class from tokenizer_config.json in a copy of the folder, or set model.tokenizer to a folder "
            "with a tokenizer.json"
        )
    return tokenizer


def _differing(tokenizer: Any, file: Path) -> tuple[str, str, str] | None:
    """A word that SentencePiece itself reads as other tokens, and how each reads it."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(token) for token in range(model.vocab_size())]
    words = [word for piece in pieces if len(word := piece.lstrip("\u2581")) > 2 and word.isalpha()]
    for text in (SIGNS, " ".join(words[:: len(words) // NUM_WORDS + 1])):
        its = [model.id_to_piece(token) for token in model.encode(text)]
        ours = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        its, ours = ([token for token, _ in groupby(tokens)] for tokens in (its, ours))  # one unknown, or several
        if its != ours:
            at = next(i for i, pair in enumerate(zip([*its, None], [*ours, None], strict=False)) if len({*pair}) > 1)
            return text[:40], " ".join(ours[at : at + 4]), " ".join(its[at : at + 4])
    return None
