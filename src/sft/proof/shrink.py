"""A configuration made small: the same architecture with few narrow layers, the first rows of the same data.

What is left is quick on a processor and goes through the same code. Sizes are odd on purpose, so that nothing divides
evenly among ranks; dropout is off, since the ranks of two strategies draw other numbers.
"""

import copy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.errors import UserError

NUM_ROWS = 2000  # of the data
HEAD_DIM = 8
# Hidden channels for each head and channels within a layer, oddest first: not each architecture takes odd ones.
SIZES = ((7, 45), (8, 45), (8, 44), (16, 44))
# The largest that each field stays, where the architecture has it.
LARGEST = {
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 20,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "sliding_window": 16,  # shorter than the samples, so that it does something
}


def shrink(config: Any, folder: Path, vocab_size: int | None = None) -> Any:
    """A copy of a composed configuration that trains a small model, written to `folder/model`.

    `vocab_size` None keeps the model's, which the tokenizer needs.
    """
    from hydra.utils import instantiate

    small = copy.deepcopy(config)
    OmegaConf.set_struct(small, False)
    source = instantiate(config.model, _convert_="all")
    write_model(folder / "model", source.load_config(), vocab_size, config.seed, source.trust_remote_code)
    small.model.tokenizer = source.tokenizer or source.path
    small.model.path, small.model.revision = str(folder / "model"), None
    small.model.init, small.model.config = "pretrained", {}
    first_rows(small.data)
    return small


def first_rows(data: Any) -> None:
    """Cuts a data configuration to its first rows; a data set that `datasets` saved has no slices and stays whole."""
    paths = data.path if OmegaConf.is_list(data.path) else [data.path]
    saved = [Path(path) / name for path in paths if path for name in ("dataset_dict.json", "state.json")]
    if "[" not in data.split and not any(file.exists() for file in saved):
        data.split = f"{data.split}[:{NUM_ROWS}]"


def on_device(config: Any, device: str, precision: str) -> None:
    """One node's `cpu` or `gpu`, the attention that every machine has, no dropout."""
    config.trainer.accelerator, config.trainer.num_nodes = device, 1
    config.trainer.precision = precision
    if config.adapter:
        config.adapter.dropout, config.adapter.quantize = 0.0, False
    config.model.attention = "packed" if config.model.attention.startswith("flash") else config.model.attention
    config.model.compile = False


def write_model(folder: Path, config: Any, vocab_size: int | None, seed: int, trust_remote_code: bool = False) -> None:
    """Writes a model of the small form of an architecture, its weights drawn from the seed.

    UserError where no small form of it runs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    error: Exception | None = None
    for width, intermediate_size in SIZES:
        try:
            small = smaller(config, vocab_size, width, intermediate_size)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(
                    small, trust_remote_code=trust_remote_code, dtype=torch.float32
                )
            with torch.no_grad():
                model(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False)
            model.save_pretrained(folder)
            return
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, AssertionError) as problem:
            error = problem
    message = " ".join(str(error).split())[:200]
    raise UserError(f"no small form of {type(config).__name__} runs ({message}): name another model with model.path")


def smaller(config: Any, vocab_size: int | None, width: int, intermediate_size: int) -> Any:
    """The configuration of the same architecture with few layers of `width` hidden channels for each head."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    kept = _kept_layers(text)
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            setattr(text, name, [value[layer] for layer in kept])
        elif ("dropout" in name or name.endswith("_pdrop")) and isinstance(value, int | float):
            setattr(text, name, 0.0)
        elif name.startswith("rope") and isinstance(value, dict):
            setattr(text, name, _cut_lists(value))
    text.num_hidden_layers = len(kept)
    num_groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    ratio = text.num_attention_heads // num_groups
    num_groups = 1 if num_groups == 1 and ratio > 1 else 3 if ratio <= 3 else 2
    _set(text, "num_key_value_heads", num_groups)
    text.num_attention_heads = num_groups * min(ratio, 4)
    text.hidden_size = text.num_attention_heads * width
    _set(text, "head_dim", HEAD_DIM)
    _set(text, "intermediate_size", intermediate_size)
    for name, largest in LARGEST.items():
        _set(text, name, min(getattr(text, name, None) or 0, largest))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    _set(text, "initializer_range", 0.1)
    text.vocab_size = vocab_size or text.vocab_size
    return type(config).from_dict(made.to_dict())


def _kept_layers(text: Any) -> list[int]:
    """Two layers, and more where there are more kinds of them: the first of each kind."""
    kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
    first = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]]
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted([*first, *others[: max(0, 2 - len(first))]])


def _cut_lists(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters whose lists have a factor for each pair of a head's channels."""
    return {
        name: _cut_lists(value)
        if isinstance(value, dict)
        else value[: HEAD_DIM // 2]
        if isinstance(value, list)
        else value
        for name, value in rope.items()
    }


def _set(text: Any, name: str, value: Any) -> None:
    """Where the architecture has the field."""
    if getattr(text, name, None) is not None:
        setattr(text, name, value)
