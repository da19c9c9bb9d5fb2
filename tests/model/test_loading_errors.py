"""What a user reads where transformers can't read or build a model."""

import json
from pathlib import Path

import pytest
import torch

import settings
from sft.errors import UserError
from sft.model.attention import NAME as PACKED
from sft.model.loading_errors import loading, not_loaded


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            KeyError("packed"),
            "KeyError: 'packed': correct its config.json or model.config, or take a transformers that",
        ),
        (OSError("no such name\non the Hub"), "no such name on the Hub"),
        (AttributeError(""), "AttributeError: no message: correct"),
        (
            ImportError(
                "\nTimmWrapperModel requires the timm library but ... install it with pip:\n`pip install timm`."
            ),
            "ImportError: TimmWrapperModel requires the timm library but ... install it with pip: `pip install timm`.: "
            "pip install timm",
        ),
        (
            ImportError("This modeling file requires the following packages: a, b. Run `pip install a b`"),
            "ImportError: This modeling file requires the following packages: a, b. Run `pip install a b`: "
            "pip install a b",
        ),
        (
            ModuleNotFoundError("No module named 'fla.ops'"),
            "ModuleNotFoundError: No module named 'fla.ops': pip install fla",
        ),
        (
            ValueError("X contains custom code ... Please pass the argument `trust_remote_code=True` to allow it."),
            "its folder holds Python code of its own, which is run to load it: read it, then set "
            "model.trust_remote_code=true",
        ),
    ],
    ids=["key", "os", "empty", "package", "packages", "module", "remote code"],
)
def test_a_line_for_each(error: Exception, line: str) -> None:
    refused = str(not_loaded("model", "a/b", error, "XForCausalLM"))
    assert refused.startswith(f"the model a/b (XForCausalLM) can't be loaded: {line}")
    assert "\n" not in refused
    if not line.endswith(("correct", "that")):
        assert refused.endswith(line)


def test_what_is_ours_and_what_is_the_disks_is_left() -> None:
    for error in (UserError("ours"), OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, loading("model", "a"):
            raise error
        assert raised.value is error


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_size": "wide"}, "StrictDataclassFieldValidationError: Validation error for field 'hidden_size': "),
        ({"model_type": "never_made"}, "The checkpoint you are trying to load has model type `never_made` but "),
        ({"num_attention_heads": None, "head_dim": 8}, "Error: "),
        ({"hidden_act": "none_such"}, "KeyError: "),
    ],
    ids=["type", "unknown", "none", "key"],
)
def test_a_configuration_that_no_model_has(
    model_folder: Path, tmp_path: Path, change: dict[str, object], line: str
) -> None:
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((model_folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = settings.model_source(path=str(tmp_path))
    for read in (source.check_weights, lambda: source.load(torch.float32)):
        with pytest.raises(UserError) as refused:
            read()
        assert str(refused.value).startswith(f"the model {tmp_path}") and line in str(refused.value)
        assert "\n" not in str(refused.value)


def test_layers_chosen_by_the_attentions_name_are_the_familys_own(tmp_path: Path) -> None:
    """GIT, for one, looks its attention up in a dictionary while it is built."""
    from transformers import GitConfig, GitForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 16, "patch_size": 8}
    GitForCausalLM(GitConfig(vision_config=vision, vocab_size=264, **small)).save_pretrained(tmp_path)
    model = settings.model_source(path=str(tmp_path)).load(torch.float32)
    assert model.config._attn_implementation != PACKED
    with pytest.raises(UserError) as refused:
        settings.model_source(path=str(tmp_path), attention=PACKED).load(torch.float32)
    assert str(refused.value) == (
        "model.attention=packed isn't for GitConfig (KeyError: 'packed'): set model.attention=auto"
    )


def test_a_model_without_gradient_checkpointing(tmp_path: Path) -> None:
    from transformers import CTRLConfig, CTRLLMHeadModel

    CTRLLMHeadModel(CTRLConfig(vocab_size=264, n_embd=16, dff=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    source = settings.model_source(path=str(tmp_path), gradient_checkpointing=True, attention="own")
    with pytest.raises(UserError) as refused:
        source.load(torch.float32)
    assert str(refused.value) == (
        "CTRLLMHeadModel has no gradient checkpointing: set model.gradient_checkpointing=false"
    )
