"""Model shapes that are measured, the arithmetic that a training step of them needs, and what devices can do of it."""

from typing import Any

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

# Dense bf16 matrix products, FLOP/s, by part of the device's name: vendors' data sheets. The first that fits counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
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


def peak(device: str) -> float | None:
    """What the data sheet says of a device; None where it isn't known here."""
    return next((rate for name, rate in PEAKS.items() if name in device), None)


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


def flops(shape: dict[str, Any], num_tokens: int, num_supervised: int, sum_squares: int, lora_rank: int = 0) -> float:
    """Useful floating-point operations of forward and backward over samples, the squares of whose lengths add up to
    `sum_squares`. With a `lora_rank` all but an adapter beside each linear layer is frozen.

    A weight takes 2 a token forward, 2 for the gradient of its input and 2 for its own, which a frozen one is spared: 6
    or 4. The head counts at supervised tokens alone. Attention's two products take, under the causal mask, 2 x d x
    (length of the sample) a token and layer forward and twice that backward. What is computed beyond (padding, masked
    scores, recomputation, a norm, an activation function) is not useful and doesn't count; without masks and with
    every token supervised this is the count of PaLM (arXiv 2204.02311, appendix B).
    """
    each = 4 if lora_rank else 6
    layers = shape["num_hidden_layers"]
    layer = sum(inputs * outputs for inputs, outputs in matrices(shape).values())
    adapters = sum(lora_rank * (inputs + outputs) for inputs, outputs in matrices(shape).values())
    body = layers * (each * layer + 6 * adapters) * num_tokens
    head = each * shape["vocab_size"] * shape["hidden_size"] * num_supervised
    attention = 6 * layers * shape["hidden_size"] * sum_squares
    return float(body + head + attention)
