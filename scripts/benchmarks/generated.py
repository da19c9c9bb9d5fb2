"""Generated samples, rows and token stores: the same on every machine, nothing is downloaded."""

import json
from pathlib import Path

import numpy as np

from sft.data import ledger
from sft.data.store import DTYPES
from sft.runs import manifest

SHORTEST, LONGEST = 25, 460  # tokens of a sample, as in GSM8K with a chat template around it


def lengths(rng: np.random.Generator, num_samples: int, longest: int = LONGEST) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and supervised tokens of each sample: two int32 [num_samples].

    Log-normal around 0.4 of the longest, of which the response is a third to a half.
    """
    tokens = rng.lognormal(np.log(180 / LONGEST * longest), 0.4, num_samples).clip(SHORTEST, longest).astype(np.int32)
    supervised = (tokens * rng.uniform(0.33, 0.5, num_samples)).astype(np.int32)
    return tokens, supervised


def write_store(folder: Path, tokens: np.ndarray, supervised: np.ndarray, vocab: int, rng: np.random.Generator) -> None:
    """A token store as `sft.data.build` would publish it, with samples of the given numbers of tokens.

    Token ids are drawn by Zipf's law, so that there is something to learn and a loss curve falls.
    """
    folder.mkdir(parents=True)
    offsets = np.concatenate([[0], np.cumsum(tokens, dtype=np.int64)])
    # The inverse of the law's distribution function, 1/rank: rank = vocab ** uniform. Ids 0 and 1 are special.
    ids = vocab ** rng.random(int(offsets[-1]), dtype=np.float32)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], tokens)
    arrays = {
        "input_ids": ids.clip(2, vocab - 1),
        "supervised": place >= np.repeat(tokens - supervised, tokens),
        "offsets": offsets,
        "lengths": tokens,
        "num_supervised": supervised,
        "rows": np.arange(len(tokens)),
        "content": np.arange(len(tokens)),
    }
    for name, dtype in DTYPES.items():
        arrays[name].astype(dtype).tofile(folder / f"{name}.bin")
    counts = ledger.empty() | {"rows": len(tokens), "samples": len(tokens), "tokens": int(offsets[-1])}
    (folder / "meta.json").write_text(json.dumps({"data_fingerprint": "generated", "sources": [counts]}))
    manifest.write(folder, manifest.entries(folder, [path.name for path in folder.iterdir()]))


def write_rows(path: Path, rng: np.random.Generator, num_rows: int) -> None:
    """Prompts and responses of made-up words, with as many words as GSM8K's have: about 45 and 50."""
    consonants, vowels = list("bcdfghjklmnprstvwz"), list("aeiou")
    syllables = [consonant + vowel for consonant in consonants for vowel in vowels]
    words = np.array(["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(5000)])

    def text(mean: int) -> str:
        num_words = int(mean * rng.lognormal(0, 0.4)) + 1
        return " ".join(words[(5000 ** rng.random(num_words)).astype(int)]) + "."

    with path.open("w") as file:
        for _ in range(num_rows):
            file.write(json.dumps({"prompt": text(45), "response": text(50)}) + "\n")
