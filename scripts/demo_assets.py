"""The demo's world, written in seconds: `python scripts/demo_assets.py OUT_DIR`.

The demo shows what SFT does, in minutes on two CPU cores and with nothing downloaded: a small model is
pre-trained on plain statements about made-up words,

    Look at qorva, a word. Read backwards, it is avroq. In all, qorva has 5 letters.

and then tuned on prompts and responses,

    Write qorva backwards.  ->  avroq

The statements hold every skill that the prompts ask for, but never the form of an instruction: the base model
scores nothing, and what SFT adds is the form. Test words are in neither text, so a right answer is a skill
and not a memory.

Everything is a pure function of (seed, split): the same files on every machine.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

NUM_PRETRAIN_DOCUMENTS = 10_000
NUM_PRETRAIN_VAL_DOCUMENTS = 100
NUM_TRAIN_ROWS = 16_800
NUM_TEST_ROWS = 420
# Statements in a document, all about one word. Short documents are what makes pre-training take minutes: after
# 1.4 M tokens of documents of 480 about three words each, a model of this size had not learned to copy a word;
# with these it copies after 0.7 M.
MIN_STATEMENTS, MAX_STATEMENTS = 3, 5

MIN_WORD_LENGTH, MAX_WORD_LENGTH = 3, 6  # letters
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiouy"
HELD_OUT_SHARE = 8  # one word in 8 is kept for the test

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Task(NamedTuple):
    """One skill: what it makes of a word, and the sentences that show it and ask for it."""

    answer: Callable[[str], str]
    statements: tuple[str, ...]  # how pre-training text says it
    prompts: tuple[str, ...]  # how a user asks for it


# A word is followed by a space, a comma, a full stop or a question mark, as it will be in prompts: where a word
# ends is then known before SFT begins.
INTRODUCTIONS = (
    "Take the word {word}.",
    "Look at {word}, a word.",
    "Here {word} is a word.",
    "And what of {word}?",
)

TASKS = {
    "capitals": Task(
        str.upper,
        ("In capitals, {word} is {answer}.", "Capitals turn {word} into {answer}."),
        ("Write {word} in capitals.", "What is {word} in capitals?"),
    ),
    "backwards": Task(
        lambda word: word[::-1],
        ("Read backwards, {word} is {answer}.", "A mirror turns {word} into {answer}."),
        ("Write {word} backwards.", "What is {word} backwards?"),
    ),
    "spell": Task(
        "-".join,
        ("Letter by letter, {word} is {answer}.", "People spell {word} as {answer}."),
        ("Spell {word}.", "How is {word} spelled?"),
    ),
    "double": Task(
        lambda word: "".join(letter * 2 for letter in word),
        ("With each letter twice, {word} is {answer}.", "Doubling turns {word} into {answer}."),
        ("Double each letter of {word}.", "Write each letter of {word} twice."),
    ),
    "count": Task(
        lambda word: str(len(word)),
        ("In all, {word} has {answer} letters.", "The length of {word} is {answer}."),
        ("How many letters does {word} have?", "Count the letters of {word}."),
    ),
    "first": Task(
        lambda word: word[0],
        ("At its start, {word} has {answer}.", "The first letter of {word} is {answer}."),
        ("What is the first letter of {word}?", "Which letter does {word} begin with?"),
    ),
    "last": Task(
        lambda word: word[-1],
        ("At its end, {word} has {answer}.", "The last letter of {word} is {answer}."),
        ("What is the last letter of {word}?", "Which letter does {word} end with?"),
    ),
}


# English words that a made-up word could hit: "has", "take", "have".
FIXED_WORDS = frozenset(
    word
    for phrases in (INTRODUCTIONS, *(task.statements + task.prompts for task in TASKS.values()))
    for phrase in phrases
    for word in re.findall("[a-z]+", phrase.lower())
)


def is_held_out(word: str) -> bool:
    """Whether a word belongs to the test, and so stands in no text that is trained on.

    Decided on the sorted letters: a held-out word must not appear as another word read backwards either.
    """
    return zlib.crc32("".join(sorted(word)).encode()) % HELD_OUT_SHARE == 0


def make_word(rng: random.Random, held_out: bool) -> str:
    """A pronounceable made-up word: consonants and vowels in turn."""
    while True:
        length = rng.randint(MIN_WORD_LENGTH, MAX_WORD_LENGTH)
        start = rng.randrange(2)
        word = "".join(rng.choice((CONSONANTS, VOWELS)[(start + i) % 2]) for i in range(length))
        if is_held_out(word) == held_out and word not in FIXED_WORDS:
            return word


def documents(seed: int, split: str, num_documents: int) -> Iterator[dict[str, str]]:
    """Pre-training text: a document introduces one word and makes a few true statements about it."""
    rng = random.Random(f"{seed}/{split}")  # a string seeds through SHA-512: the same everywhere
    for _ in range(num_documents):
        word = make_word(rng, held_out=False)
        sentences = [rng.choice(INTRODUCTIONS).format(word=word)]
        for task in rng.sample(list(TASKS.values()), rng.randint(MIN_STATEMENTS, MAX_STATEMENTS)):
            subject = rng.choice((word, "it"))
            sentences.append(rng.choice(task.statements).format(word=subject, answer=task.answer(word)))
        yield {"text": " ".join(sentences)}


def examples(seed: int, split: str, num_rows: int) -> Iterator[dict[str, str]]:
    """SFT rows, the tasks in turn; split "test" asks about held-out words only."""
    rng = random.Random(f"{seed}/{split}")
    for row in range(num_rows):
        name = list(TASKS)[row % len(TASKS)]
        word = make_word(rng, held_out=split == "test")
        prompt = rng.choice(TASKS[name].prompts).format(word=word)
        yield {"prompt": prompt, "response": TASKS[name].answer(word), "task": name}


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges: a token is a byte, so any text can be encoded and none is unknown.

    The turn marks get ids but never occur in pre-training, as with published base models.
    """
    # Here and not above: importing transformers takes seconds, and tests import this file for its constants.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,  # the default would rewrite " ." as "." when decoding
    ).save_pretrained(folder)


def write_rows(path: Path, rows: Iterator[dict[str, str]]) -> None:
    """One JSON object a line, the keys as they come."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_assets(out_dir: Path, seed: int) -> bool:
    """Write the whole world, or nothing; False where `out_dir` already holds it. The world of another seed, or of an
    older version of this file, gives way.

    Raises:
        FileExistsError: `out_dir` holds something that is no world.
    """
    manifest = {
        "seed": seed,
        "source": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    manifest_path = out_dir / "assets.json"
    if out_dir.exists():
        if not manifest_path.is_file():
            raise FileExistsError(f"{out_dir} exists but is not the demo: remove it, or name another")
        # The folder appears by one rename, so the manifest vouches for its neighbours.
        if json.loads(manifest_path.read_text()) == manifest:
            return False
        shutil.rmtree(out_dir)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f".{out_dir.name}-") as temporary:
        folder = Path(temporary) / "assets"
        folder.mkdir()
        write_rows(folder / "pretrain.jsonl", documents(seed, "pretrain", NUM_PRETRAIN_DOCUMENTS))
        write_rows(folder / "pretrain_val.jsonl", documents(seed, "pretrain_val", NUM_PRETRAIN_VAL_DOCUMENTS))
        write_rows(folder / "train.jsonl", examples(seed, "train", NUM_TRAIN_ROWS))
        write_rows(folder / "test.jsonl", examples(seed, "test", NUM_TEST_ROWS))
        write_tokenizer(folder / "tokenizer")
        (folder / "assets.json").write_text(json.dumps(manifest, indent=2) + "\n")
        os.rename(folder, out_dir)
    return True


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the demo's data and tokenizer.")
    parser.add_argument("out_dir", type=Path, metavar="OUT_DIR")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    written = write_assets(args.out_dir, args.seed)
    print(f"{args.out_dir}: {'written' if written else 'already complete'}")


if __name__ == "__main__":
    main()
