"""What fails in an export is found before training."""

import json
import re
import shutil
from pathlib import Path

import pytest

from running import Sft


@pytest.fixture
def base(sft: Sft) -> Path:
    """A copy of the tiny model, which the settings name."""
    folder = sft.folder / "base"
    shutil.copytree(sft.settings[0].removeprefix("model.path="), folder)
    sft.settings[0] = "model.path=./base"
    return folder


GREEDY = {"do_sample": False, "temperature": 0.7, "top_p": 0.9}  # as many on the Hub


@pytest.mark.parametrize("adapter", [[], ["adapter=lora"], ["adapter=lora", "adapter.merge=false"]], ids=" ".join)
def test_sampling_settings_of_a_greedy_model(
    sft: Sft, base: Path, adapter: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "generation_config.json").write_text(json.dumps(GREEDY))
    assert sft.train("run=run", "max_steps=2", *adapter) == 0
    lines = capsys.readouterr().out.splitlines()
    said = "the generation config of ./base sets temperature=0.7, top_p=0.9 without effect "
    (first, again) = [number for number, line in enumerate(lines) if line.startswith(said)]
    # Before the first step, and at the export itself.
    assert first < next(number for number, line in enumerate(lines) if line.startswith("step 0")) < again
    stored = json.loads((sft.run_folder() / "export" / "generation_config.json").read_text())
    assert stored["do_sample"] is False and "temperature" not in stored and "top_p" not in stored
    assert sft("rehearse", *sft.settings, "rehearse.timeout=0.001") == 1  # all of its checks pass
    assert re.search("^  check .* end in", capsys.readouterr().out, re.M)


def not_saved(*_: object, **__: object) -> None:
    raise TypeError("Object of type set is not\nJSON serializable")


@pytest.mark.parametrize(
    ("method", "adapter", "part"),
    [
        ("transformers.PreTrainedTokenizerFast.save_pretrained", [], "tokenizer of ./base"),
        ("transformers.PretrainedConfig.to_json_file", [], "model's configuration of ./base"),
        (
            "peft.LoraConfig.save_pretrained",
            ["adapter=lora", "adapter.merge=false"],
            "adapter's configuration of ./base",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("command", ["train", "rehearse"])
def test_what_can_not_be_saved_is_refused_before_training(
    sft: Sft,
    base: Path,
    command: str,
    method: str,
    adapter: list[str],
    part: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(method, not_saved)
        assert sft(command, *sft.settings, "run=run", "max_steps=2", *adapter) == 2
        assert capsys.readouterr().err == (
            f"sft: {'check failed: ' if command == 'rehearse' else ''}the run could not be exported after training, "
            f"because the {part} can't be saved and loaded again (TypeError: Object of type set is not JSON "
            "serializable): correct it, or set export=false to train without an export\n"
        )
        assert not sft.run_folder().exists()
        if command == "train":
            assert sft.train("run=run", "max_steps=1", "export=false", *adapter) == 0
    assert not list(Path().glob("runs/*/export*"))


def test_settings_that_contradict_are_refused_before_training(
    sft: Sft, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (base / "generation_config.json").write_text('{"num_return_sequences": 3}')
    assert sft.train("run=run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sft: the generation config of ./base can't be used: Greedy methods (do_sample != True)")
    assert line.endswith("correct generation_config.json in a copy of the model's folder, and name that in model.path")
    assert not sft.run_folder().exists()
