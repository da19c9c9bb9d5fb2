"""A LoRA adapter as model.path: continued by another adapter, or merged before all weights are trained."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import settings
from made_up import OneRank
from sft.errors import UserError
from sft.export.merge import adapter_config, merged, write_adapter

# peft asks transformers by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
IDS = torch.arange(20)[None]


@pytest.fixture
def adapter_folder(model_folder: Path, tmp_path: Path) -> Path:
    """As peft saves one: of rank 4 on two kinds of layers, one of which has another rank."""
    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2})
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def peft_logits(model_folder: Path, adapter_folder: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter_folder)(IDS).logits


@pytest.mark.parametrize("sharded", [False, True])
def test_it_is_continued_from_its_own_weights(model_folder: Path, adapter_folder: Path, sharded: bool) -> None:
    source = settings.model_source(path=str(adapter_folder), attention="eager", adapter=settings.adapter(r=16))
    assert source.adapter is not None
    assert (source.adapter.r, source.adapter.alpha, source.base) == (4, 6, str(model_folder))
    model: Any = source.load(torch.float32, sharding=OneRank() if sharded else None)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 8 and all("lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, peft_logits(model_folder, adapter_folder))
    # Its export is one more adapter of the same base, and merging it makes what peft makes of it.
    assert adapter_config(source).base_model_name_or_path == str(model_folder)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if name in trained}
    specs = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    (adapter_folder.parent / "again").mkdir()
    write_adapter(adapter_folder.parent / "again", source, specs, tensors.__getitem__, None)
    assert torch.equal(
        peft_logits(model_folder, adapter_folder.parent / "again"), peft_logits(model_folder, adapter_folder)
    )
    whole, read = merged(source, specs, tensors.__getitem__, torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    expected = dict(PeftModel.from_pretrained(base, adapter_folder).merge_and_unload().named_parameters())
    assert whole.keys() == expected.keys()
    assert all(torch.equal(read(name), parameter) for name, parameter in expected.items())


@pytest.mark.parametrize("sharded", [False, True])
def test_it_is_merged_before_all_weights_are_trained(model_folder: Path, adapter_folder: Path, sharded: bool) -> None:
    source = settings.model_source(path=str(adapter_folder), attention="eager")
    model: Any = source.load(torch.float32, sharding=OneRank() if sharded else None)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation="eager")
    expected: Any = PeftModel.from_pretrained(base, adapter_folder).merge_and_unload()
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "is an adapter of type IA3, and only LoRA is trained here"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa, which changes the base's weights"),
        ({"bias": "all"}, "with bias=all, which is not trained here"),
        ({"modules_to_save": ["lm_head"]}, "with modules_to_save, which is not trained here"),
        ({"base_model_name_or_path": None}, "names no base"),
        ({"r": 8}, "doesn't fit its base"),
    ],
    ids=str,
)
def test_what_is_not_trained_here(adapter_folder: Path, changes: dict[str, object], message: str) -> None:
    file = adapter_folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        settings.model_source(path=str(adapter_folder), adapter=settings.adapter()).load(torch.float32)
