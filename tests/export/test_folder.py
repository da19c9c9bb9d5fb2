"""The Hugging Face folder of a model that is read one weight at a time."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import settings
from made_up import SIZE, Weights
from sft.errors import UserError
from sft.export.folder import generation_config, write_model
from sft.model.loading import ModelSource

KINDS = {
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "untied": {"model_type": "llama", "tie_word_embeddings": False},
    "other names on disk": {"model_type": "gpt_neox"},
    "experts joined in memory": {"model_type": "mixtral", "num_local_experts": 4},
}


def model_of(kind: str) -> tuple[ModelSource, Any]:
    source = settings.model_source(init="random", tokenizer="unused", config=SIZE | KINDS[kind], attention="eager")
    torch.manual_seed(0)
    return source, source.load(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    source, model = model_of(kind)
    weights, lines = Weights(model), []
    write_model(
        tmp_path / "ours",
        source,
        weights.layout,
        weights.read,
        GenerationConfig(),
        max_shard_size=40_000,
        log=lines.append,
    )
    model.save_pretrained(tmp_path / "theirs", max_shard_size=40_000)

    ours, theirs = (
        {path.name: load_file(path) for path in (tmp_path / each).glob("*.safetensors")} for each in ("ours", "theirs")
    )
    assert len(ours) > 2
    assert {file: tensors.keys() for file, tensors in ours.items()} == {
        file: tensors.keys() for file, tensors in theirs.items()
    }
    for file, tensors in theirs.items():
        assert all(torch.equal(ours[file][name], tensor) for name, tensor in tensors.items())
    for name in ("config.json", "model.safetensors.index.json"):
        assert json.loads((tmp_path / "ours" / name).read_text()) == json.loads(
            (tmp_path / "theirs" / name).read_text()
        )
    # Only what transformers splits or joins is held all at once, and is said to be.
    whole = sum(tensor.nbytes for tensor in weights.tensors.values())
    assert [len(lines), weights.most_held] == (
        [1, whole] if kind.startswith("experts") else [0, SIZE["vocab_size"] * 128]
    )


def test_reloads_in_another_dtype(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    source, model = model_of("tied")
    weights = Weights(model)
    generation = generation_config(source, tokenizer, [258])
    write_model(tmp_path, source, weights.layout, weights.read, generation, dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert AutoConfig.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert reloaded.generation_config.eos_token_id == [258]
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    for name, parameter in reloaded.named_parameters():
        assert torch.equal(parameter, weights.tensors[name].bfloat16())


def test_the_export_stops_where_the_model_stops_and_where_it_was_trained_to(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 8, 2, 77], "pad_token_id": 0}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    backend = Tokenizer(WordLevel({"<pad>": 0, "<eom>": 8, "</s>": 1, "<eot>": 2, "<call>": 7, "word": 77}, "<pad>"))
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<eom>", "<eot>", "<call>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    # <eot> and <eom> have no name in the tokenizer, as in Llama 3; 77 is a word.
    generation = generation_config(settings.model_source(path=str(tmp_path)), tokenizer, [2, 7])
    assert generation.eos_token_id == [2, 7, 1, 8]


def base_with(model_folder: Path, folder: Path, **generation: object) -> ModelSource:
    shutil.copytree(model_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return settings.model_source(path=str(folder))


@pytest.mark.parametrize(
    ("base", "left_out", "said"),
    [
        (
            {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1},
            ["temperature", "top_p"],
            "temperature=0.7, top_p=0.9 without effect (do_sample=False, num_beams=1)",
        ),
        ({"top_k": 20, "min_p": 0.1}, ["min_p", "top_k"], "min_p=0.1, top_k=20 without effect"),
        (
            {"early_stopping": True, "length_penalty": 2.0},
            ["early_stopping", "length_penalty"],
            "early_stopping=True, length_penalty=2.0 without effect",
        ),
        ({"use_cache": False, "cache_implementation": "static"}, ["cache_implementation"], "=static without effect"),
        ({"output_scores": True}, ["output_scores"], "output_scores=True without effect"),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, [], None),
        ({"num_beams": 2, "early_stopping": True, "num_return_sequences": 2}, [], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_generation_settings_without_effect_are_left_out(
    base: dict[str, object],
    left_out: list[str],
    said: str | None,
    model_folder: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    source, lines = base_with(model_folder, tmp_path / "base", **base), []
    generation_config(source, tokenizer, [258], lines.append).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    del stored["transformers_version"]
    kept = {name: value for name, value in base.items() if name not in left_out}
    assert stored == kept | {"eos_token_id": [258], "pad_token_id": 256}
    assert len(lines) == (said is not None)
    if said:
        assert f"the generation config of {source.path} sets " in lines[0] and said in lines[0]


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ('{"num_return_sequences": 3}', "Greedy methods (do_sample != True) without beam search do not support"),
        ('{"num_return_sequences": 3, "num_beams": 2}', "(3) has to be smaller or equal to `num_beams` (2)"),
        ('{"cache_implementation": "nope"}', "Invalid `cache_implementation` (nope)"),
        ('{"max_new_tokens": "many"}', "'<=' not supported between instances of 'str' and 'int'"),
        ("{", "is not a valid JSON file"),
    ],
)
def test_generation_settings_that_can_not_be_used(
    base: str, reason: str, model_folder: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    source = base_with(model_folder, tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(base)
    with pytest.raises(UserError) as refused:
        generation_config(source, tokenizer, [258])
    assert str(refused.value).startswith(f"the generation config of {source.path} can't be used: ")
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_size_that_is_none(tmp_path: Path) -> None:
    source, model = model_of("tied")
    weights = Weights(model)
    with pytest.raises(UserError, match="max_shard_size=big is no size"):
        write_model(tmp_path, source, weights.layout, weights.read, GenerationConfig(), max_shard_size="big")
