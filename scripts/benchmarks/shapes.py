"""Model shapes that are measured, and the arithmetic that a training step of them needs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.model.flops import Flops

# As transformers configures them. The names are those of models of this shape; the weights are random.
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "model_type": "llama",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": False,
    },
    "qwen-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}


def fields(options: dict[str, Any]) -> dict[str, Any]:
    """Fields of the model's configuration: of a shape by name, or of a Llama of these sizes with heads of 64."""
    if options.get("shape"):
        return SHAPES[options["shape"]] | {"max_position_embeddings": options["max_length"]}
    num_heads = max(1, options["hidden"] // 64)
    return {
        "model_type": "llama",
        "vocab_size": options["vocab"],
        "hidden_size": options["hidden"],
        "intermediate_size": 4 * options["hidden"],
        "num_hidden_layers": options["layers"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "tie_word_embeddings": False,
        "max_position_embeddings": options["max_length"],
    }


def matrices(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each linear layer of a decoder layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    width = hidden // shape["num_attention_heads"]
    queries, keys = shape["num_attention_heads"] * width, shape["num_key_value_heads"] * width
    return {
        "q_proj": (hidden, queries),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (queries, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }


def flops(shape: dict[str, Any], lora_rank: int = 0) -> "Flops":
    """Useful operations of training a model of this shape or, with a `lora_rank`, an adapter of all its layers."""
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.config import CONF
    from sft.model.adapter import Adapter
    from sft.model.flops import of_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    if lora_rank:
        settings: Any = OmegaConf.to_container(OmegaConf.load(CONF / "adapter" / "lora.yaml"))
        del settings["_target_"]
        Adapter(**settings | {"r": lora_rank}).add(model)
    return of_model(model)
