"""A small model is the same architecture; the samples of a certificate make small last steps."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from sft.data.mask import IGNORE
from sft.data.step_plan import epoch_plan
from sft.errors import UserError
from sft.proof import shrink
from sft.proof.excerpt import LEFT_OVER, excerpt, made_up
from sft.proof.reference import check_order

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": ("llama", {"num_attention_heads": 32, "num_key_value_heads": 8}),
    "heads of their own width": ("qwen3", {"tie_word_embeddings": True}),
    "biases": ("qwen2", {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2}),
    "layers of two kinds": ("gemma3_text", {}),
    "experts": ("mixtral", {}),
    "other names": ("gpt2", {}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_small_model_is_the_same_architecture(name: str, tmp_path: Path) -> None:
    kind, fields = ARCHITECTURES[name]
    big = AutoConfig.for_model(kind, **fields)
    shrink.write_model(tmp_path, big, 97, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    small = model.config
    assert small.model_type == kind
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert small.vocab_size == 97 and small.tie_word_embeddings == big.tie_word_embeddings
    ratio = big.num_attention_heads // getattr(big, "num_key_value_heads", big.num_attention_heads)
    groups = getattr(small, "num_key_value_heads", small.num_attention_heads)
    assert small.num_attention_heads // groups == min(ratio, 4)
    if getattr(big, "layer_types", None):
        assert set(small.layer_types) == set(big.layer_types) and len(small.layer_types) == small.num_hidden_layers


def test_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shrink.write_model(tmp_path / name, AutoConfig.for_model("llama"), 97, seed)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]


def test_architecture_without_a_small_form_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "SIZES", ((7, 45),))  # odd, which experts can't be
    with pytest.raises(UserError, match="no small form of MixtralConfig runs"):
        shrink.write_model(tmp_path, AutoConfig.for_model("mixtral"), 97, seed=0)


def test_first_rows_alone_are_read(tmp_path: Path) -> None:
    data = OmegaConf.create({"path": "x.jsonl", "split": "train"})
    shrink.first_rows(data)
    assert data.split == "train[:2000]"
    sliced = OmegaConf.create({"path": ["x.jsonl", "y"], "split": "train[5:9]"})
    shrink.first_rows(sliced)
    assert sliced.split == "train[5:9]"
    (tmp_path / "state.json").touch()
    saved = OmegaConf.create({"path": str(tmp_path), "split": "train"})
    shrink.first_rows(saved)
    assert saved.split == "train"  # has no slices


def _num_packs(lengths: np.ndarray, max_length: int, packed: bool) -> int:
    plan = epoch_plan(lengths, lengths, seed=0, epoch=0, global_batch_size=16, max_length=max_length, packing=packed)
    return len(plan.packs)


def test_last_step_of_an_epoch_is_a_small_one() -> None:
    samples = made_up(seed=0, global_batch_size=16)
    for packed in (True, False):
        assert _num_packs(samples.lengths, samples.max_length, packed) % 16 in LEFT_OVER
    assert all(labels[0] == IGNORE for _, labels in samples.pairs)
    assert samples.num_supervised.min() > 0


def test_excerpt_numbers_ids_anew_and_prefers_short_samples() -> None:
    rng = np.random.default_rng(0)
    lengths = [300 if number % 3 == 0 else int(rng.integers(5, 40)) for number in range(90)]
    pairs = [(ids := 1000 * rng.integers(1, 50, length), np.where(np.arange(length) < 2, IGNORE, ids))
             for length in lengths]  # fmt: skip
    taken = excerpt(pairs, np.array(lengths), 16)
    assert taken.lengths.max() < 40
    assert taken.vocab_size % 2 == 1 and taken.vocab_size <= 51
    ids, labels = taken[0]
    first = next(pair for pair in pairs if len(pair[0]) < 40)
    assert len(ids) == len(first[0])
    assert (np.argsort(ids, kind="stable") == np.argsort(first[0], kind="stable")).all()
    assert (labels[:2] == IGNORE).all() and (labels[2:] == ids[2:]).all()


def test_excerpt_is_kept_on_disk(tmp_path: Path) -> None:
    samples = made_up(seed=1, global_batch_size=16)
    samples.save(tmp_path / "samples.npz")
    back = samples.load(tmp_path / "samples.npz")
    assert back.max_length == samples.max_length and len(back) == len(samples)
    for one, other in zip(samples.pairs, back.pairs, strict=True):
        assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


@pytest.mark.parametrize("packed", [True, False])
def test_step_plan_takes_each_sample_once_an_epoch(packed: bool) -> None:
    samples = made_up(seed=0, global_batch_size=16)
    assert check_order(samples.steps(20, 16, packed, seed=0), len(samples))


def test_order_that_is_none_is_found() -> None:
    assert check_order([[2, 0], [1], [0, 1]], 3)
    assert not check_order([[2, 0], [0], [1, 1]], 3)  # one twice
    assert not check_order([[0, 1], [3], [0]], 3)  # one that there isn't
    assert not check_order([[0, 1], [0, 1]], 3)  # one left out
