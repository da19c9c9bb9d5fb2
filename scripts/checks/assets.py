"""A tiny model, tokenizer and rows, drawn from a seed, as a user would have them on disk."""

from pathlib import Path
from typing import Any

from demo_assets import examples, write_rows, write_tokenizer

# Sizes that no number of ranks divides; heads as narrow as CUDA's kernel takes them without padding.
LLAMA = {
    "vocab_size": 267,
    "hidden_size": 96,
    "intermediate_size": 190,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
    "initializer_range": 0.08,
}


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A Llama with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**LLAMA | changes)).save_pretrained(folder)
    return folder


def write_data(folder: Path, num_rows: int = 60) -> Path:
    write_rows(folder / "rows.jsonl", examples(0, "train", num_rows))
    return folder / "rows.jsonl"
