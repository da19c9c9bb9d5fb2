"""Runs with an adapter: what is trained and kept, what is exported, what is refused."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import mishaps
from runfiles import final_files, rows, weights
from running import Sft
from sft.checkpoint.checkpoint import Checkpoint

pytestmark = pytest.mark.xdist_group("adapter")  # the run is made once

# Another seed than the base model was drawn from: it must be read, also when a run is resumed.
LORA = ("adapter=lora", "adapter.r=4", "adapter.alpha=8", "adapter.dropout=0.1", "optimizer.lr=5e-2", "seed=1")
SETTINGS = ("run=run", "epochs=3", "val_every=2", "checkpoint.save_every=2", "+model.config.attention_dropout=0.1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """A folder with `runs/run`: nine steps with an adapter, exported merged."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("lora"), model_folder, data_file, monkeypatch)
        result = sft.process("train", *sft.settings, *SETTINGS, *LORA)
    assert result.code == 0, result.output
    return sft.folder


@pytest.fixture
def there(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sft:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return Sft(tmp_path, Path(), Path(), monkeypatch)


def test_the_adapter_is_trained_and_nothing_else(there: Sft, model_folder: Path) -> None:
    run = there.run_folder()
    adapter = weights(run)
    assert len(adapter) == 28
    assert all(".lora_A.default." in name or ".lora_B.default." in name for name in adapter)
    metrics = rows(run)
    assert float(metrics[9]["train/loss"]) < float(metrics[1]["train/loss"]) - 0.1
    base, exported = load_file(model_folder / "model.safetensors"), load_file(run / "export" / "model.safetensors")
    assert base.keys() == exported.keys()
    for name, weight in base.items():
        key = name.removesuffix("weight") + "lora_{}.default.weight"
        added = adapter[key.format("B")] @ adapter[key.format("A")] * (8 / 4) if key.format("A") in adapter else 0
        assert torch.equal(exported[name], weight + added)
        assert torch.equal(exported[name], weight) == (key.format("A") not in adapter)
    verdict = json.loads((run / "export" / "verified.json").read_text())
    assert verdict["equal"]
    assert verdict["largest_difference"] < 1e-4
    card = (run / "export" / "README.md").read_text()
    assert "| adapter | LoRA of rank 4, alpha 8, on all-linear; merged into the weights |" in card


def test_killed_and_started_again(sft: Sft, finished: Path) -> None:
    killed = sft.process("train", *sft.settings, *SETTINGS, *LORA, before=mishaps.killed_in_a_step)
    assert killed.code == -signal.SIGKILL, killed.output
    again = sft.process("train", *sft.settings, *SETTINGS, *LORA)
    assert again.code == 0, again.output
    assert "resumed after step 2" in again.output
    assert final_files(sft.run_folder()) == final_files(finished / "runs" / "run")
    assert rows(sft.run_folder()) == rows(finished / "runs" / "run")


@pytest.mark.filterwarnings("ignore")  # peft's, of gradient checkpointing's old name
def test_separate_is_what_peft_loads(there: Sft, model_folder: Path) -> None:
    folder = Path("runs/run/export")
    assert there("export", "run=run", "merge=false", "output=adapter") == 0
    assert json.loads(Path("adapter/verified.json").read_text())["equal"]
    assert not Path("adapter/model.safetensors").exists()
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(model_folder))
    ids = torch.arange(40)[None]
    whole = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    assert not torch.allclose(base(ids).logits, whole, atol=1e-2)
    for model in (
        AutoModelForCausalLM.from_pretrained("adapter"),
        AutoPeftModelForCausalLM.from_pretrained("adapter"),
        PeftModel.from_pretrained(base, "adapter"),
    ):
        logits = model(ids).logits
        assert torch.allclose(logits, whole[..., : logits.shape[-1]], atol=1e-5)  # AutoPeftModel drops spare rows
    assert "library_name: peft" in Path("adapter/README.md").read_text()


def test_score_and_generate_with_a_separate_adapter(there: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    def output(*arguments: str) -> str:
        capsys.readouterr()
        assert there(*arguments) == 0
        return capsys.readouterr().out

    commands: list[tuple[str, ...]] = [
        ("score", "run=run"),
        ("generate", "run=run", "--prompt", "Reverse abc (3).", "max_new_tokens=8"),
    ]
    scores, answer = (output(*command) for command in commands)
    assert there("export", "run=run", "merge=false") == 0
    assert Path("runs/run/export/adapter_model.safetensors").exists()
    separate_scores, separate_answer = (output(*command) for command in commands)
    assert separate_answer == answer
    for line, other in zip(scores.splitlines(), separate_scores.splitlines(), strict=True):
        assert json.loads(line) == pytest.approx(json.loads(other), abs=1e-3)
    lines: list[dict[str, Any]] = [json.loads(line) for line in separate_scores.splitlines()]
    loss = -sum(line["log_p_response"] for line in lines) / sum(line["num_response_tokens"] for line in lines)
    assert loss == pytest.approx(float(rows(there.run_folder())[-1]["val/loss"]), abs=1e-5)


@pytest.mark.parametrize("merge", ["true", "false"])
def test_another_adapter_is_not_the_one_that_was_trained(
    there: Sft, merge: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = Checkpoint.tensor
    monkeypatch.setattr(Checkpoint, "tensor", lambda self, name, **average: tensor(self, name, **average) * 1.01)
    assert there("export", "run=run", f"merge={merge}", "output=other") == 2
    assert "is not the model that was trained" in capsys.readouterr().err
    assert not Path("other").exists()


def test_in_bf16(sft: Sft) -> None:
    settings = ("run=run", "max_steps=2", "adapter=lora", "trainer.precision=bf16-true", "adapter.merge=false")
    assert sft.train(*settings) == 0
    assert {tensor.dtype for tensor in weights(sft.run_folder()).values()} == {torch.float32}
    assert sft("export", "run=run", "merge=true", "output=merged") == 0
    assert {tensor.dtype for tensor in load_file("merged/model.safetensors").values()} == {torch.bfloat16}


def test_the_form_of_the_export_is_not_in_the_name(sft: Sft) -> None:
    settings = ("max_steps=1", "export=false", "adapter=lora")
    for more in ((), ("adapter.merge=false",), ("adapter.r=8",)):
        assert sft.train(*settings, *more) == 0
    assert len(list((sft.folder / "runs").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adapter=lora", "adapter.target_modules=[q_proj,query]"], "query is no layer of LlamaForCausalLM"),
        (["adapter=lora", "adapter.merge=whole"], "adapter.merge=whole is not true or false"),
        pytest.param(
            ["adapter=qlora"],
            "needs a CUDA device: set adapter=lora",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_mistakes(sft: Sft, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", *arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not sft.run_folder().exists()


def test_nothing_to_merge(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    assert sft("export", "run=run", "merge=true") == 2
    assert "has no adapter" in capsys.readouterr().err
