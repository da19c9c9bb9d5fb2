"""scripts/architectures: what becomes of one model of each kind, that it sees what is wrong, and its page."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import architectures, architectures_page
from checks.architectures import APART, PACKED, REFUSED, TRACEBACK, WRONG
from checks.process import Place
from sft.errors import UserError
from sft.model import inputs
from sft.model.first_batch import Prover
from sft.model.found import Proof
from sft.model.isolation import Isolation
from warm import python

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "architectures"
EXPECTED = {
    "llama": PACKED,
    "gpt2": PACKED,
    "opt": PACKED,
    "openai-gpt": APART,
    "gemma3_text": PACKED,
    "llama4_text": PACKED,
    "gemma2": PACKED,
    "qwen3_moe": PACKED,
    "phimoe": PACKED,
    "gpt_oss": PACKED,
    "deepseek_v3": PACKED,
    "deepseek_v32": APART,
    "bloom": APART,
    "mpt": APART,
    "xglm": APART,
    "mamba2": APART,
    "falcon_h1": APART,
    "lfm2": APART,
    "qwen3_5_text": APART,
    "bart": APART,
    "bert": PACKED,
    "xlnet": REFUSED,
    "gemma3n_text": PACKED,
    "gemma4_text": PACKED,
    "gemma3": PACKED,
    "qwen3_vl": PACKED,
}

NOT_OFFERED = {("openai-gpt", "checkpointing")}  # by transformers


def row_of(name: str, folder: Path) -> dict[str, Any]:
    return architectures.measure(Place(False, folder), name)[1]


@pytest.mark.parametrize("name", architectures.QUICK)
def test_one_of_each_kind(name: str, tmp_path: Path) -> None:
    row = row_of(name, tmp_path)
    assert row["kind"] == EXPECTED[name], row
    if row["kind"] == REFUSED:
        return
    for part in ("checkpointing", "lora", "zero3", "export"):
        assert ("kind" in row[part]) == ((name, part) in NOT_OFFERED), row[part]
    assert all(part["gradient"] < 1e-4 for part in (row, row["checkpointing"], row["lora"]) if "kind" not in part)


def test_a_state_that_reaches_the_next_sample_is_silently_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prover, "prove", lambda self: Proof(Isolation(), {}))
    monkeypatch.setattr(inputs, "recurrent_boundaries", lambda model: [])  # told of them its code refuses
    row = row_of("falcon_h1", tmp_path)
    assert row["kind"] == WRONG and "is off by" in row["why"]
    assert row["forward"] > 1e-3


def test_how_training_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(error: Exception) -> None:
        def prove(self: Prover) -> None:
            raise error

        monkeypatch.setattr(Prover, "prove", prove)

    ends(UserError("it is Friday"))
    row = row_of("llama", tmp_path)
    assert (row["kind"], row["why"]) == (REFUSED, "it is Friday")
    ends(KeyError("key"))
    row = row_of("llama", tmp_path)
    assert (row["kind"], row["why"][:16]) == (TRACEBACK, "KeyError: 'key' ") and "test_architectures.py:" in row["why"]


def test_a_model_whose_tokens_see_later_ones_is_not_to_be_trained(tmp_path: Path) -> None:
    model = architectures.Plain.__new__(architectures.Plain)
    model.reads_ahead = 0.5
    with pytest.raises(architectures.Off, match="tokens see later ones"):
        architectures.compared(None, Isolation(), model, Place(False, tmp_path))


@pytest.mark.parametrize("part", ["checkpointing", "lora", "zero3", "export"])
def test_what_is_wrong_in_one_part_alone(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(model: Any) -> Any:
        with torch.no_grad():
            model.model.norm.weight.mul_(2)
        return model

    load, attended = architectures.ModelSource.load, architectures.attended
    if part in ("checkpointing", "lora"):
        wrong = "gradient_checkpointing" if part == "checkpointing" else "adapter"
        monkeypatch.setattr(
            architectures,
            "attended",
            lambda source, isolation: (doubled if getattr(source, wrong) else lambda it: it)(
                attended(source, isolation)
            ),
        )
    elif part == "zero3":
        monkeypatch.setattr(
            architectures.ModelSource,
            "load",
            lambda self, dtype, sharding=None, **options: (
                doubled(load(self, dtype, sharding=sharding)) if sharding else load(self, dtype, **options)
            ),
        )
    else:
        write = architectures.write_export
        monkeypatch.setattr(
            architectures,
            "write_export",
            lambda folder, source, specs, read, *rest, **options: write(
                folder,
                source,
                specs,
                lambda name: read(name) * (2 if name == "model.norm.weight" else 1),
                *rest,
                **options,
            ),
        )
    row = row_of("llama", tmp_path)
    assert row["kind"] == WRONG and row["why"].startswith(f"{part}: "), row
    assert row["forward"] < 1e-4  # of training itself
    assert [other for other in ("checkpointing", "lora", "zero3", "export") if row[other].get("kind")] == [part]


def test_errors_are_of_the_whole_gradient_and_of_the_worst_parameter() -> None:
    log_probs = torch.tensor([-1.0, -2.0])
    exact = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0, 4.0]), "c": torch.tensor([0.0])}  # together 5

    def errors(forward: float = 0.0, **gradients: Tensor) -> dict[str, Any]:
        return architectures.errors((log_probs + forward, exact | gradients), (log_probs, exact))

    assert errors() == {"forward": 0, "gradient": 0, "worst": 0, "parameter": "c"}
    within = errors(5e-5, b=torch.tensor([0.0002, 4.0003]), c=torch.tensor([0.00005]))
    assert within["forward"] == pytest.approx(5e-5, rel=0.01)
    assert within["gradient"] == pytest.approx((0.0002**2 + 0.0003**2 + 0.00005**2) ** 0.5 / 5, rel=1e-2)
    # c is measured by a hundredth of the whole, 0.05
    assert within["parameter"] == "c" and within["worst"] == pytest.approx(0.00005 / 0.05, rel=1e-3)
    for wrong, match in (
        ({"forward": 2e-4}, "^forward is off by 2e-04"),
        ({"forward": float("nan")}, "^forward is off by nan"),
        ({"b": torch.tensor([0.0, 4.001])}, "^gradient is off by 2e-04"),
        ({"c": torch.tensor([0.0001])}, "^gradient of c is off by 2e-03"),
    ):
        with pytest.raises(architectures.Off, match=match):
            errors(**wrong)
    with pytest.raises(architectures.Off, match=r"^gradient is off by 6e-01"):  # one that training doesn't have
        architectures.errors((log_probs, {"b": exact["b"]}), (log_probs, exact))


def test_the_page() -> None:
    part = {"forward": 1e-7, "gradient": 2e-7}
    parts = {"checkpointing": part, "lora": {"kind": REFUSED, "why": "no"}, "zero3": {"way": "whole"}}
    rows = {
        "b": {"kind": PACKED, "attention": "packed", **part, **parts, "export": {"way": "by weight"}},
        "a": {"kind": APART, "attention": "eager", **part, **parts, "export": {"kind": REFUSED}, "why": "a *state*"},
        "c": {"kind": REFUSED, "why": "tokens see <later> ones"},
        "d": {"kind": TRACEBACK, "attention": "packed", "why": "KeyError: 1", "draws": True},
        "v": {"kind": WRONG, "why": "off"},
    }
    about = {"versions": dict.fromkeys(("transformers", "torch", "peft"), "1.2"), "cpu": "any", "cores": 2}
    about |= {"date": "2026-01-31", "minutes": 7.5, "command": "scripts/architectures", "limits": "Limits."}
    text = architectures_page.render(rows, about, {"First": ["c", "b", "a", "d", "e"], "Second": ["v"], "Third": ["w"]})
    assert "5 architectures: 1 packed, 1 apart, 1 refused, 1 silently wrong, 1 traceback." in text
    assert "(2026-01-31, 7.5 minutes on 2 cores (any), transformers 1.2, torch 1.2, peft 1.2)" in text
    table = text[text.index("## First") :].split("\n\n")
    assert table[1] == "4 architectures: 1 packed, 1 apart, 1 refused, 0 silently wrong, 1 traceback."
    assert table[2].splitlines()[2:] == [
        "| `a` | apart | eager | 1e-07 | 2e-07 | 2e-07 | refused | whole | refused |",
        "| `b` | packed | packed | 1e-07 | 2e-07 | 2e-07 | refused | whole | by weight |",
        "| `d` * | traceback | packed | traceback | traceback |  |  |  |  |",
    ]
    assert table[3:5] == ["### Apart, and why", "- `a`: a \\*state\\*"]
    assert "- `c`: tokens see &lt;later> ones" in table
    assert "## Third" not in text
    assert architectures_page.num_faults(rows) == 2


def test_the_script(tmp_path: Path) -> None:
    def script(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python().executable, str(SCRIPT), *arguments], capture_output=True, text=True)

    ended = script("llama", "--output", str(tmp_path / "page.md"), "--rows", str(tmp_path / "rows.json"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.endswith("1 architectures: 1 packed, 0 silently wrong, 0 traceback.\n")
    assert json.loads((tmp_path / "rows.json").read_text())["llama"]["kind"] == PACKED
    page = (tmp_path / "page.md").read_text()
    assert "scripts/architectures llama\n" in page and "\n| `llama` | packed | packed |" in page
    ended = script("lama")
    assert ended.returncode == 1 and ended.stderr.endswith(
        "lama is no model type of a language model of this transformers\n"
    )
