"""The token store's building, beside the tokenizer library by itself and the mask as it was."""

import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import generated
from benchmarks.conditions import table

VOCAB = 16_000  # of the tokenizer that is trained here
WORDS = (  # the pattern by which Qwen's tokenizers split a text
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
EXCHANGES = (1, 5, 20)  # of a chat
TIMES = 5  # as many rows for several workers, so that starting them doesn't decide
PAIR = ("data=prompt_response", "data.conversation.prompt=question", "data.conversation.response=answer")
FIGURES = ("tokens/s", "ratio", "at most", "a worker's MB")
Result = dict[str, Any]


def build(options: Namespace, rng: np.random.Generator, folder: Path) -> Result:
    """Rates of each kind of row, with each number of workers, and the memory of a worker."""
    pairs = texts(options, rng, folder)
    train_tokenizer(pairs).save_pretrained(folder / "tokenizer")
    kinds = {"GSM8K" if options.gsm8k else "question and answer": 0}
    for number in EXCHANGES[-1:] if options.quick else EXCHANGES:
        kinds[f"chats, {number} exchange{'s' if number > 1 else ''}"] = number
    results = {name: measured(options, folder, pairs, number) for name, number in kinds.items()}
    show(options, results)
    results["large row"] = large_row(options, folder, pairs)
    return results


def texts(options: Namespace, rng: np.random.Generator, folder: Path) -> list[tuple[str, str]]:
    """Questions and answers: those of GSM8K, or made-up words in the same numbers."""
    path, names = Path(options.gsm8k or folder / "generated.jsonl"), ("question", "answer")
    if not options.gsm8k:
        generated.write_rows(path, rng, min(options.rows, 7_473))
        names = ("prompt", "response")
    with path.open() as file:
        rows = [json.loads(line) for line in file]
    return [(row[names[0]], row[names[1]]) for row in rows]


def write(path: Path, pairs: list[tuple[str, str]], num_exchanges: int, num_pairs: int) -> tuple[str, ...]:
    """A file of `num_pairs` pairs, over and over, in rows of question and answer (0) or chats of some exchanges; the
    settings that read it."""
    turns = islice(cycle(pairs), num_pairs)
    with path.open("w") as file:
        for row in chats(turns, num_exchanges) if num_exchanges else ({"question": q, "answer": a} for q, a in turns):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return ("data=messages",) if num_exchanges else PAIR


def chats(pairs: Iterator[tuple[str, str]], num_exchanges: int) -> Iterator[Result]:
    while exchanges := list(islice(pairs, num_exchanges)):
        roles = ("user", "assistant")
        turns = [{"role": role, "content": text} for pair in exchanges for role, text in zip(roles, pair, strict=True)]
        yield {"messages": turns}


def measured(options: Namespace, folder: Path, pairs: list[tuple[str, str]], num_exchanges: int) -> Result:
    """Medians of some repeats: the library and the build in turn, then the build of more rows with more workers; the
    old mask once."""
    runs: dict[str, list[Result]] = {}
    for workers in options.workers:
        is_first = workers == options.workers[0]
        path = folder / f"rows-{num_exchanges}-{workers}.jsonl"
        settings = write(path, pairs, num_exchanges, options.rows * (1 if is_first else TIMES))
        more = (*settings, f"data.num_workers={workers}", f"data.cache_dir={folder / path.stem}")
        made = process(folder, path, more, options.repeats, beside=is_first)
        runs |= {name: each for name, each in made.items() if each and name != "build"}
        runs[f"build {workers}"] = made["build"]
        path.unlink()
    result: Result = {}
    for name, each in runs.items():
        seconds = {clock: float(np.median([run[clock] for run in each])) for clock in ("wall", "cpu")}
        rates = {f"{of}_per_second": each[0][of] / seconds["wall"] for of in ("rows", "tokens")}
        result[name] = {**each[0], **seconds, **rates, "cpu_rate": each[0]["tokens"] / seconds["cpu"]}
    return result


def process(
    folder: Path, path: Path, settings: tuple[str, ...], repeats: int = 1, beside: bool = False
) -> dict[str, list[Result]]:
    """What `build_process` measures; `beside` the build the library and the old mask, too."""
    request = {"path": str(path), "tokenizer": str(folder / "tokenizer"), "repeats": repeats, "beside": beside}
    request["settings"] = [*settings, "data.max_length=32768", "model.path=none"]
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.build_process"],
        input=json.dumps(request),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        sys.exit(f"scripts/bench: {ended.stderr}")
    result: dict[str, list[Result]] = json.loads(ended.stdout.splitlines()[-1])
    return result


def show(options: Namespace, results: Result) -> None:
    one = f"build {options.workers[0]}"
    rows = []
    for name, result in results.items():
        new, library, old = result[one], result["library"], result["old"]
        rows.append(
            [
                name,
                *(f"{result[key]['rows_per_second']:,.0f}" for key in ("old", one, "library")),
                *(f"{result[key]['tokens_per_second']:,.0f}" for key in ("old", one, "library")),
                f"{new['cpu_rate'] / library['cpu_rate']:.2f}",
                f"{new['cpu_rate'] / old['cpu_rate']:.1f}",
            ]
        )
    table(
        f"token store built of {options.rows:,} exchanges, {options.workers[0]} worker; encode_batch: the tokenizer "
        "library alone, one thread, on the rendered texts; ratios by processor time",
        ["", "rows/s old", "new", "encode_batch", "tokens/s old", "new", "encode_batch", "new/encode_batch", "new/old"],
        rows,
    )
    if others := options.workers[1:]:
        table(
            f"more workers, starting them included, on {options.rows * TIMES:,} exchanges; at most: if each had a core "
            "to itself, by processor time",
            ["", *(f"{number} workers: {figure}" for number in others for figure in FIGURES)],
            [
                [name, *(cell for number in others for cell in cells(result[one], result[f"build {number}"], number))]
                for name, result in results.items()
            ],
        )


def cells(one: Result, several: Result, number: int) -> list[str]:
    """FIGURES of a build by several workers, beside that by one."""
    ratio = several["tokens_per_second"] / one["tokens_per_second"]
    at_most = number * several["cpu_rate"] / one["cpu_rate"]
    return [f"{several['tokens_per_second']:,.0f}", f"{ratio:.2f}", f"{at_most:.2f}", f"{several['peak'] / 1e6:,.0f}"]


def large_row(options: Namespace, folder: Path, pairs: list[tuple[str, str]]) -> Result:
    """Memory of a worker that meets a row of `options.large_row` MB among ordinary ones."""
    path = folder / "large-row.jsonl"
    num_pairs = min(options.rows, 6_000)
    write(path, pairs, 0, num_pairs)
    text = " ".join(question for question, _ in pairs)
    large = (text * (int(options.large_row * 1e6 / len(text)) + 1))[: int(options.large_row * 1e6)]
    with path.open("a") as file:
        file.write(json.dumps({"question": "How long is this?", "answer": large}) + "\n")
    result = {}
    for workers in options.workers:
        more = (*PAIR, f"data.num_workers={workers}", f"data.cache_dir={folder / f'cache-large-{workers}'}")
        [result[f"build {workers}"]] = process(folder, path, (*more, "data.max_lost=1.0"))["build"]
    table(
        f"{num_pairs:,} rows and one of {options.large_row:g} MB",
        ["workers", "seconds", "rows lost", "a process's MB"],
        [
            [name.split()[1], f"{run['wall']:.1f}", f"{run['lost']:.0f}", f"{run['peak'] / 1e6:,.0f}"]
            for name, run in result.items()
        ],
    )
    return result


def train_tokenizer(pairs: list[tuple[str, str]]) -> Any:
    """A byte-level BPE with a chat template, trained on the texts: none needs to be downloaded."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(token, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((text for pair in pairs for text in pair), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special[0],
        pad_token=special[0],
        additional_special_tokens=special[1:],
        chat_template=CHATML,
    )
