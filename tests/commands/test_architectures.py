"""Architectures of each kind from the command line: trained, exported as what they were, reloaded, and asked."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from made_up import SIZE
from running import Sft

TEXT = SIZE | {
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
VISION: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "patch_size": 14}
# Class, configuration, parts that are frozen.
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "falcon_h1": (
        "FalconH1ForCausalLM",
        TEXT | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        (),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        TEXT | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
        (),
    ),
    "bloom": ("BloomForCausalLM", {"vocab_size": 264, "hidden_size": 32, "n_layer": 2, "n_head": 4}, ()),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        (),
    ),
    "qwen3_5": (
        "Qwen3_5ForConditionalGeneration",
        {
            "text_config": TEXT
            | {"layer_types": ["linear_attention", "full_attention"]}
            | {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
            | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
            "vision_config": VISION | {"depth": 1, "num_heads": 2, "out_hidden_size": 32},
            "image_token_id": 260,
            "video_token_id": 261,
            "vision_start_token_id": 262,
            "vision_end_token_id": 263,
        },
        ("model.visual.",),
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        {
            "text_config": TEXT
            | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8, "num_kv_shared_layers": 0}
            | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 264, "global_head_dim": 8},
            "vision_config": VISION
            | {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
            | {"head_dim": 8, "global_head_dim": 8},
            "image_token_id": 260,
            "boi_token_id": 261,
            "eoi_token_id": 262,
        },
        ("model.vision_tower.", "model.embed_vision."),
    ),
}
# Without the kernels that keep state or, BLOOM, positions apart.
APART = ("falcon_h1", "bloom", "qwen3_5")
IMAGES = '{"image_processor_type": "SomeImageProcessor", "patch_size": 14}'


@pytest.mark.parametrize("kind", KINDS)
def test_trains_exports_reloads_and_answers(
    kind: str, sft: Sft, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings, frozen = KINDS[kind]
    base = sft.folder / "base"
    torch.manual_seed(0)
    getattr(transformers, name)(AutoConfig.for_model(kind, **settings)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    if frozen:
        (base / "preprocessor_config.json").write_text(IMAGES)

    assert sft.train(f"model.path={base}", "name=run", "max_steps=3") == 0, capsys.readouterr().err
    assert ("is frozen and exported unchanged" in capsys.readouterr().out) == bool(frozen)
    run = next(sft.folder.glob("runs/run*"))
    assert json.loads((run / "provenance.json").read_text())["first_batch"]["apart"] == (kind in APART)
    export = run / "export"
    assert json.loads((export / "verified.json").read_text())["equal"]
    assert json.loads((export / "config.json").read_text())["architectures"] == [name]
    before, after = (tensors(folder) for folder in (base, export))
    assert before.keys() == after.keys()
    kept = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith(frozen)} <= kept if frozen else True
    # Nearly all else has moved: experts that no token chose, and states that begin at zero, may not have.
    language = {key for key in before if not frozen or not key.startswith(frozen)}
    assert len(language & kept) < len(language) / 4
    if frozen:
        assert (export / "preprocessor_config.json").read_text() == IMAGES
        assert type(AutoModelForImageTextToText.from_pretrained(export)).__name__ == name

    assert sft("generate", f"run={run}", "--prompt", "Reverse abc.", "max_new_tokens=3") == 0, capsys.readouterr().err
    shutil.rmtree(sft.folder / "runs")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
