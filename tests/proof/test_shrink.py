"""A small model is the same architecture; the samples of a certificate make small last steps."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from sft.commands import certify, rehearse
from sft.config import CONF
from sft.data.labels import IGNORE
from sft.data.step_plan import epoch_plan
from sft.errors import UserError
from sft.proof import shrink
from sft.proof.cells import steps
from sft.proof.excerpt import LAST_STEP_PACKS, Excerpt, excerpt, made_up
from sft.proof.reference import check_order
from sft.training.prepare import setup

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
    inconsistent = AutoConfig.for_model(
        "llama", hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=2
    )
    monkeypatch.setattr(shrink, "forms", lambda config, vocab_size: [lambda: inconsistent])
    with pytest.raises(UserError, match=r"no small form of MixtralConfig runs .*: name another model"):
        shrink.write_model(tmp_path, AutoConfig.for_model("mixtral"), 97, seed=0)


def test_first_rows_alone_are_read(tmp_path: Path) -> None:
    def cut(path: object, split: str, **validation: str) -> list[str | None]:
        data = OmegaConf.create({"path": path, "split": split, "val_path": None, "val_split": None, **validation})
        shrink.first_rows(data, 2000)
        return [data.split, data.val_split]

    assert cut("x.jsonl", "train") == ["train[:2000]", None]
    assert cut("x.jsonl", "train", val_split="test") == ["train[:2000]", "test[:2000]"]
    assert cut(["x.jsonl", "y"], "train[5:9]") == ["train[5:9]", None]
    (tmp_path / "state.json").touch()
    assert cut(str(tmp_path), "train") == ["train", None]  # has no slices
    assert cut("x.jsonl", "train", val_path=str(tmp_path)) == ["train", None]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_rehearsal_and_certificate_train_the_same_small_model(
    device: str, tmp_path: Path, model_folder: Path, data_file: Path
) -> None:
    settings = [
        f"model.path={model_folder}",
        "model.revision=main",
        "model.attention=flash_attention_2",
        "model.compile=true",
        "+model.config.attention_dropout=0.1",
        f"data.path={data_file}",
        "data.max_length=256",
        "data.num_workers=1",
        f"data.cache_dir={tmp_path / 'cache'}",
        "trainer=gpu",
        "trainer.num_nodes=4",
        "strategy=ddp",
        "adapter=lora",
        "adapter.dropout=0.1",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = OmegaConf.create(OmegaConf.to_container(compose("rehearse", settings), resolve=True))
        cells = compose("certify", [*settings, "precision=bf16-mixed", f"device={device}"])
    rehearse.shrink_job(job, setup(job), tmp_path / "job")
    cells, _ = certify.prepare(cells, tmp_path / "cells")

    names = ("_target_", "tokenizer", "revision", "init", "config", "attention", "compile")
    assert [job.model[name] for name in names] == [cells.model[name] for name in names]
    assert [job.model.tokenizer, job.model.revision] == [str(model_folder), "main"]
    assert [job.model.attention, job.model.compile, job.model.config] == ["auto", False, {}]
    assert job.adapter == cells.adapter and job.adapter.dropout == 0
    for config in (job, cells):
        assert [config.trainer.num_nodes, config.trainer.precision] == [1, "bf16-mixed"]
    assert [job.trainer.accelerator, cells.trainer.accelerator] == ["cpu", device]
    small = [json.loads((tmp_path / name / "model" / "config.json").read_text()) for name in ("job", "cells")]
    assert [size.pop("vocab_size") > 200 for size in small] == [True, False]  # the ids that occur are enough for cells
    assert small[0] == small[1] and small[0]["attention_dropout"] == 0


def _num_packs(lengths: np.ndarray, max_length: int, packed: bool) -> int:
    plan = epoch_plan(lengths, lengths, seed=0, epoch=0, global_batch_size=16, max_length=max_length, packing=packed)
    return len(plan.packs)


def test_last_step_of_an_epoch_is_a_small_one() -> None:
    samples = made_up(seed=0, global_batch_size=16)
    for packed in (True, False):
        assert _num_packs(samples.lengths, samples.max_length, packed) % 16 in LAST_STEP_PACKS
    assert all(labels[0] == IGNORE for _, labels in samples.pairs)
    assert samples.num_supervised.min() > 0


def test_excerpt_numbers_ids_anew_and_prefers_short_samples() -> None:
    rng = np.random.default_rng(0)
    lengths = [300 if number % 3 == 0 else int(rng.integers(5, 40)) for number in range(90)]
    pairs = [(ids := 1000 * rng.integers(1, 50, length), np.where(np.arange(length) < 2, IGNORE, ids))
             for length in lengths]  # fmt: skip
    taken = excerpt(Excerpt(pairs, 0), np.array(lengths), 16)
    assert taken.lengths.max() < 40
    assert taken.weights(0) is None
    assert taken.vocab_size % 2 == 1 and taken.vocab_size <= 51
    ids, labels = taken[0]
    first = next(pair for pair in pairs if len(pair[0]) < 40)
    assert len(ids) == len(first[0])
    assert (np.argsort(ids, kind="stable") == np.argsort(first[0], kind="stable")).all()
    assert (labels[:2] == IGNORE).all() and (labels[2:] == ids[2:]).all()


def test_excerpt_keeps_the_weights_of_the_data() -> None:
    pairs = [(np.arange(length), np.array([IGNORE, *range(1, length)])) for length in range(3, 93)]
    weights = [np.array([0, *[1 / length] * (length - 1)], dtype=np.float32) for length in range(3, 93)]
    taken = excerpt(Excerpt(pairs, 0, weights), np.arange(3, 93), 16)
    for number, length in enumerate(taken.lengths):
        assert taken.weights(number).tolist() == [0, *[np.float32(1 / length)] * (length - 1)]
    assert taken.weight_sums[0] == np.float64(np.float32(1 / 3)) * 2


def test_drawn_weights_are_those_of_supervised_tokens() -> None:
    plain = made_up(seed=1, global_batch_size=16)
    weighted = plain.reweighted(5)
    assert plain.weights(0) is None and (plain.weight_sums == plain.num_supervised).all()
    for number, (_, labels) in enumerate(weighted.pairs):
        weights = weighted.weights(number)
        assert weights.dtype == np.float32 and ((weights > 0) == (labels != IGNORE)).all()
        assert weighted.weight_sums[number] == weights.sum(dtype=np.float64)
    # Of another mean than 1, and unequal within a sample: a step that forgets one of them can't be right.
    assert weighted.weight_sums.sum() > 1.3 * plain.num_supervised.sum()
    assert (plain.reweighted(5).weights(3) == weighted.weights(3)).all()
    assert not (plain.reweighted(6).weights(3) == weighted.weights(3)).all()


@pytest.mark.parametrize("weighted", [True, False])
def test_excerpt_is_the_same_in_another_process(weighted: bool) -> None:
    samples = made_up(seed=1, global_batch_size=16)
    samples = samples.reweighted(0) if weighted else samples
    copy = pickle.loads(pickle.dumps(samples))
    assert (copy.weight_sums == samples.weight_sums).all()
    assert [copy.weights(7) is None, np.array_equal(copy.weights(7), samples.weights(7))] == [not weighted, True]
    assert copy.max_length == samples.max_length and len(copy) == len(samples)
    for one, other in zip(samples.pairs, copy.pairs, strict=True):
        assert (one[0] == other[0]).all() and (one[1] == other[1]).all()


@pytest.mark.parametrize("packed", [True, False])
def test_step_plan_takes_each_sample_once_an_epoch(packed: bool) -> None:
    samples = made_up(seed=0, global_batch_size=16)
    assert check_order(steps(samples, packed, seed=0), len(samples))


def test_order_that_is_none_is_found() -> None:
    assert check_order([[2, 0], [1], [0, 1]], 3)
    assert not check_order([[2, 0], [0], [1, 1]], 3)  # one twice
    assert not check_order([[0, 1], [3], [0]], 3)  # one that there isn't
    assert not check_order([[0, 1], [0, 1]], 3)  # one left out
