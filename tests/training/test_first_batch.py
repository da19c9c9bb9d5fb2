"""What a run's model proves on its first samples: said, kept, and taken from there when the run is resumed."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast

from conftest import tiny_llama
from runfiles import change, final_files, weights
from running import Sft
from sft.model import attention
from sft.model.isolation import Isolation
from sft.proof.shrink import write_model
from sft.training import first_batch

SETTINGS = ("run=run", "export=false", "max_steps=2", "checkpoint.save_every=1", "data.val_size=0")


@pytest.fixture(scope="module")
def bloom(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bloom")
    BloomForCausalLM(BloomConfig(vocab_size=264, hidden_size=32, n_layer=2, n_head=4)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def proof(sft: Sft) -> dict[str, Any]:
    return json.loads((sft.run_folder() / "provenance.json").read_text())["first_batch"]


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("first batch: ")]


def leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two samples of a row are taken for one."""
    original = attention._lengths.__wrapped__

    def merged(bounds: torch.Tensor) -> list[int]:
        found = original(bounds)
        return [sum(found[:2]), *found[2:]]

    monkeypatch.setattr(attention, "_lengths", merged)


def test_bloom_is_trained_by_its_own_attention(sft: Sft, bloom: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train(f"model.path={bloom}", *SETTINGS) == 0
    (line,) = lines(capsys)
    assert line.startswith("first batch: bloom can't be computed by packed attention here (")
    assert "samples run one at a time" in line and " x slower" in line
    kept = proof(sft)
    assert (kept["attention"], kept["apart"]) == ("eager", True) and line.startswith(f"first batch: {kept['said']} (")
    assert Isolation.recorded(sft.run_folder()) == Isolation("eager", apart=True)
    assert kept["where"]["device"] == "cpu" and kept["where"]["versions"]["torch"] == torch.__version__
    recipe = json.loads((sft.run_folder() / "recipe.json").read_text())
    assert (recipe["attention"], recipe["samples"]) == ("eager", "one at a time")


def test_a_resumed_run_takes_what_was_proven(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    def attempt(number: int, *settings: str) -> list[str]:
        mishap = f"+callbacks.mishap={{_target_: mishaps.Mishap, step: {number}, rank: 0, what: raise}}"
        assert sft.train(*SETTINGS, "max_steps=9", mishap, *settings) == 1
        return lines(capsys)

    (line,) = attempt(2)
    assert line.startswith("first batch: packed samples are computed as by the model's own code: ")
    assert attempt(3) == []
    (line, after) = attempt(4, "model.isolate=apart")
    assert line.startswith("first batch: samples run one at a time by packed attention, as the settings say")
    assert after == (
        "first batch: samples ran packed by packed attention until here, and run one at a time by packed attention "
        "from now on"
    )
    assert Isolation.recorded(sft.run_folder()) == Isolation(apart=True)
    file = sft.run_folder() / "provenance.json"
    kept = proof(sft)
    kept["where"]["device"] = "another"
    change(file, first_batch=kept)
    assert len(attempt(5, "model.isolate=apart")) == 1
    assert proof(sft)["where"]["device"] == "cpu"


def test_a_leak_at_the_run_s_start(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    leak(monkeypatch)
    assert sft.train(*SETTINGS, "model.isolate=packed") == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith("sft: model.isolate=packed: llama doesn't keep packed samples apart: alone ")
    assert not sft.run_folder().exists()
    assert sft.train(*SETTINGS) == 0
    (line,) = lines(capsys)
    assert (
        line.startswith("first batch: samples of llama in a row depend on each other (")
        and "they run one at a time" in line
    )


def test_preview_proves_the_model_here(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft("preview", *sft.settings, "preview.packs=0", "check=true") == 0
    printed = capsys.readouterr().out
    assert "first batch: packed samples are computed as by the model's own code: " in printed
    assert [line.split("  ")[0] for line in printed.splitlines() if "e-" in line][-4:] == [
        "own, twice in a batch",
        "one at a time",
        "packed",
        "packed, in a long row",
    ]
    leak(monkeypatch)
    assert sft("preview", *sft.settings, "preview.packs=0", "check=true", "model.isolate=packed") == 2
    assert capsys.readouterr().err.startswith("sft: model.isolate=packed: llama doesn't keep packed samples apart: ")


def without_proof() -> None:
    proof = SimpleNamespace(isolation=Isolation(), said="", seconds=0.0, record=lambda: {"attention": "packed"})
    first_batch.prove = lambda trainer, module: proof


@pytest.mark.xdist_group("strategies")
@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_training_doesn_t_notice_it(sft: Sft, strategy: str) -> None:
    found = []
    for before, run in ((None, "proven"), (without_proof, "unproven")):
        ended = sft.ranks(2, "train", *sft.settings, *SETTINGS, f"run={run}", f"strategy={strategy}", before=before)
        assert ended.code == 0, ended.output
        assert ("packed samples are computed" in ended.output) == (before is None)
        found.append(final_files(sft.run_folder(run)))
    assert found[0] == found[1]


@pytest.mark.xdist_group("strategies")
@pytest.mark.parametrize("kind", ["falcon_h1", "qwen3_moe"])
def test_ranks_that_gather_weights_prove_and_train_any_model(
    kind: str, sft: Sft, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # The mixer of one reads its convolution's weight; the experts of the other are a leaf to DeepSpeed by default.
    write_model(tmp_path, AutoConfig.for_model(kind), 264, seed=0)
    tokenizer.save_pretrained(tmp_path)
    settings = (f"model.path={tmp_path}", *SETTINGS, "max_steps=1", "optimizer=sgd", "optimizer.lr=0.3")
    assert sft.train(*settings, "run=one") == 0
    zero3 = ("strategy=deepspeed_zero3", "model.gradient_checkpointing=true", "run=two")
    ended = sft.ranks(2, "train", *sft.settings, *settings, *zero3)
    assert ended.code == 0, ended.output
    expected = weights(sft.run_folder("one"))
    for name, tensor in weights(sft.run_folder("two")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=3e-6, msg=name)


def test_the_samples_that_are_chosen() -> None:
    class Samples:
        def __init__(self, *lengths: int) -> None:
            self.lengths = torch.tensor(lengths).numpy()

        def __getitem__(self, index: int) -> tuple[Any, None]:
            return torch.arange(index * 1000, index * 1000 + int(self.lengths[index])).numpy(), None

    def chosen(*lengths: int) -> list[tuple[int, int]]:
        return [(int(ids[0]) // 1000, len(ids)) for ids in first_batch.first_samples(Samples(*lengths), "cpu")]

    assert chosen(5, 60, 300, 50, 49, 70) == [(4, 49), (3, 50), (1, 60)]
    assert chosen(500, 300, 400) == [(1, 96), (2, 96), (0, 96)]
    assert chosen(5, 6, 7, 90) == [(1, 6), (2, 7), (3, 90)]
    assert chosen(5) == [(0, 5)] * 3


def test_code_beside_the_weights_is_named() -> None:
    class Own(type(tiny_llama())):
        __module__ = "transformers_modules.mine.modeling"

    model, source = tiny_llama(), SimpleNamespace(base="some/model", base_revision=None)
    assert first_batch.remote_code(model, source) is None
    model.__class__ = Own
    assert first_batch.remote_code(model, source) == "some/model"
    model.config._commit_hash = "abc"
    assert first_batch.remote_code(model, source) == "some/model@abc"
