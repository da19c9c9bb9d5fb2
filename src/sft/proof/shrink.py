"""A configuration made small: a few narrow layers of the same architecture, the first rows of the same data.

It runs the same code in seconds, on a processor as well. Sizes are odd, so that nothing divides evenly among ranks.
Dropout is off, since the ranks of two strategies draw different random numbers.
"""

import copy
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import PretrainedConfig

from sft.errors import UserError
from sft.model.model_class import auto_class

HEAD_DIM = 8
# Hidden channels of each head and channels within a layer. Odd ones come first; not every architecture takes them.
SIZES = ((7, 45), (8, 45), (8, 44), (16, 44))
# The largest value of each field that an architecture may have.
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
    "sliding_window": 16,  # shorter than the samples, so that it has an effect
}


def first_rows(data: DictConfig, num_rows: int) -> None:
    """Cuts a data configuration to the first rows. A data set that `datasets` saved has no slices and stays whole."""
    paths: list[str] = []
    named = data.val_path.values() if isinstance(data.val_path, DictConfig) else [data.val_path]
    for value in (data.path, *named):
        paths += [value] if isinstance(value, str) else value or []
    if any((Path(path) / name).exists() for path in paths for name in ("dataset_dict.json", "state.json")):
        return
    for name in ("split", "val_split"):
        if data[name] and "[" not in data[name]:
            data[name] = f"{data[name]}[:{num_rows}]"


def shrink(config: DictConfig, folder: Path, device: str, precision: str, vocab_size: int | None = None) -> None:
    """Makes a configuration train a small model, written to `folder/model`, on one node's `cpu` or `gpu`.

    `vocab_size` None keeps the size that the tokenizer needs.
    """
    source = instantiate(config.model, _convert_="all")
    write_model(folder / "model", source.load_config(), vocab_size, config.seed, source.trust_remote_code)
    # The revision stays: it is the tokenizer's too, and means nothing to a folder.
    config.model.tokenizer, config.model.new_weights = source.tokenizer_place()[0], None
    if vocab_size is not None:
        config.model.add_tokens = None
    config.model.path, config.model.init, config.model.config = str(folder / "model"), "pretrained", {}
    if config.model.attention.startswith("flash"):
        config.model.attention = "auto"  # which every machine has
    config.model.compile = False  # takes longer than all the rest
    if config.adapter:
        if vocab_size is not None:  # of the made-up model, whose head is its embeddings
            config.adapter.modules_to_save = config.adapter.trainable_tokens = None
        config.adapter.dropout, config.adapter.quantize = 0.0, False
    config.trainer.accelerator, config.trainer.num_nodes = device, 1
    config.trainer.precision = precision


def write_model(
    folder: Path, config: PretrainedConfig, vocab_size: int | None, seed: int, trust_remote_code: bool = False
) -> None:
    """Writes a small model of an architecture with weights drawn from the seed; UserError if no small form runs."""
    for width, intermediate_size in SIZES:
        try:
            small = smaller(config, vocab_size, width, intermediate_size)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = auto_class(small).from_config(small, trust_remote_code=trust_remote_code, dtype=torch.float32)
            with torch.no_grad():
                model(input_ids=torch.tensor([[0, 1, 2, 3]]), use_cache=False)
            model.save_pretrained(folder)
            return
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, AssertionError) as error:
            message = " ".join(str(error).split())[:200]
    raise UserError(f"no small form of {type(config).__name__} runs ({message}): name another model with model.path")


def smaller(config: PretrainedConfig, vocab_size: int | None, width: int, intermediate_size: int) -> PretrainedConfig:
    """The configuration of the same architecture with few layers and `width` hidden channels for each head."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
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
    _replace(text, "num_key_value_heads", num_groups)
    text.num_attention_heads = num_groups * min(ratio, 4)
    text.hidden_size = text.num_attention_heads * width
    _replace(text, "head_dim", HEAD_DIM)
    _replace(text, "intermediate_size", intermediate_size)
    for name, largest in LARGEST.items():
        _replace(text, name, min(getattr(text, name, None) or 0, largest))
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    _replace(text, "initializer_range", 0.1)
    text.vocab_size = vocab_size or text.vocab_size
    return type(config).from_dict(small.to_dict())


def _kept_layers(text: PretrainedConfig) -> list[int]:
    """The first layer of each kind, and at least two layers."""
    kinds = getattr(text, "layer_types", None) or [""] * text.num_hidden_layers
    first = [layer for layer, kind in enumerate(kinds) if kind not in kinds[:layer]]
    others = [layer for layer in range(len(kinds)) if layer not in first]
    return sorted([*first, *others[: max(0, 2 - len(first))]])


def _cut_lists(value: object) -> object:
    """Cuts the lists of rotary parameters, which hold a factor for each pair of a head's channels."""
    if isinstance(value, dict):
        return {name: _cut_lists(inner) for name, inner in value.items()}
    return value[: HEAD_DIM // 2] if isinstance(value, list) else value


def _replace(text: PretrainedConfig, name: str, value: float) -> None:
    """Sets a field if the architecture has it."""
    if getattr(text, name, None) is not None:
        setattr(text, name, value)
