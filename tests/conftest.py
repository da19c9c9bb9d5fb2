"""A tokenizer, a model and data of the tests' own: nothing is downloaded. And how the suite is run."""

import json
import os
import random
import sys
from collections import defaultdict
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: workers and ranks share the cores, and the models are tiny
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCH_EXTENSIONS_DIR"] = f"{sys.prefix}/torch_extensions"  # no other program's lock is waited for

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import warm
from cluster import Cluster
from running import Sft

# Groups (whose tests share what takes long) and files of the tests that take longest, longest first: with one left
# over for the end, a worker would be at it alone.
LONGEST = ("slurm", "certify", "slurm too", "strategies", "preemption", "adapter")

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, ids 0 to 255, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=special[1:],
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    config = {
        "vocab_size": 264,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.fixture(scope="session")
def model_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights and its tokenizer, as a user would have one on disk."""
    import torch

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 rows of `prompt` and `response`, of different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    draw = random.Random(0)
    rows = []
    for number in range(60):
        word = "".join(draw.choices("abcdefgh", k=draw.randint(2, 12)))
        rows.append({"prompt": f"Reverse {word} ({number}).", "response": word[::-1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sft(tmp_path: Path, model_folder: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch) -> Sft:
    """The command line in an empty folder, with settings for a run of seconds."""
    return Sft(tmp_path, model_folder, data_file, monkeypatch)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm cluster of 3 nodes that claim 4 processors each. Leave it idle."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster.start(nodes=3, cpus=4)
    cluster.stop()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        group = item.get_closest_marker("xdist_group")
        name = group.args[0] if group else item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


@pytest.hookimpl(tryfirst=True, wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    # Before the test's time limit begins.
    if item.get_closest_marker("cpu_adam"):
        warm.compile_cpu_adam()
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each reason why tests were skipped, with what would run them."""
    skipped = defaultdict(list)
    for report in terminalreporter.getreports("skipped"):
        _, _, reason = report.longrepr
        skipped[reason.removeprefix("Skipped: ")].append(report.nodeid.partition("::")[0])
    for reason, files in skipped.items():
        run = " ".join(["python -m pytest", *sorted(set(files))])
        terminalreporter.line(f"{len(files)} skipped: {reason}; then: {run}")
