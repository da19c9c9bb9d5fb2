"""What published checkpoints set where the defaults of a configuration, by themselves, make no model that runs.

Facts for the sweep alone: a small form is made of any configuration that makes one.
"""

from typing import Any


def _sections(*sections: int, **rest: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": rope | rest}


_MOE = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 6}
_HUNYUAN = {"head_dim": 128, "num_key_value_heads": 8}
_GLM = {"text_config": _sections(8, 12, 12, partial_rotary_factor=0.5)}
_QWEN = {"text_config": _sections(16, 24, 24)}

PUBLISHED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0},
        "n_heads": 48,
        "d_model": 6144,
    },
    "deepseek_v2": {**_MOE, "first_k_dense_replace": 1},
    "dots1": {**_MOE, "n_routed_experts": 128, "n_shared_experts": 2, "first_k_dense_replace": 1},
    # The text part alone is a model too, and has no model type by which it is loaded.
    "emu3": {"architectures": ["Emu3ForConditionalGeneration"]},
    "mllama": {"architectures": ["MllamaForConditionalGeneration"]},
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm_ocr": _QWEN,
    "glmga": _GLM,
    "hunyuan_v1_dense": _HUNYUAN,
    "hunyuan_v1_moe": {**_HUNYUAN, "num_experts": 64, "moe_topk": 8},
    "lfm2": {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14]},  # else without a convolution
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if n in (2, 6, 10, 14, 18, 21) else "conv" for n in range(24)],
    },
    "ministral": {"head_dim": 128, "num_hidden_layers": 36, "sliding_window": 32768},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "paddleocr_vl": _QWEN,
    "qwen2_5_omni_thinker": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen2_vl": _QWEN,
    "xmod": {"default_language": "en_XX"},
}
