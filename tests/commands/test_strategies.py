"""Every strategy makes the same numbers, and goes on from any other's checkpoint on any number of ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_llama
from runfiles import rows
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.model.adapter import initial

# Two epochs of 11 packs in steps of 4: the last step of an epoch has 3, and leaves a rank of 4 without any.
SETTINGS = (
    "run=run",
    "epochs=2",
    "val_every=2",
    "checkpoint.save_every=2",
    "micro_batch_size=1",
    "export=false",
    "evaluation.layers_every=1",
    "optimizer.weight_decay=0.1",
    # Rounding in gradients near zero would otherwise be scaled up to the size of the learning rate.
    "optimizer.eps=1e-3",
)
# In mid-epoch: the checkpoint of step 4 is there, step 6 is the second epoch's last.
KILLED = "+callbacks.kill={_target_: mishaps.Mishap, step: 6, rank: null, what: kill}"
FACTS = "+callbacks.facts={_target_: observers.Facts}"
Place = tuple[str, int]  # strategy, ranks

pytestmark = pytest.mark.xdist_group("strategies")  # each run is made once


class Lab:
    """Runs of one experiment on a model of sizes that no number of ranks divides; each is made once."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self.model, self.data = folder, model, data
        self.made: dict[tuple[Place, bool], Path] = {}

    def run(self, place: Place, killed: bool, begun: Path | None = None) -> Path:
        """The run's folder: from the start or, with `begun`, from where that run was killed."""
        if begun is None and (place, killed) in self.made:
            return self.made[place, killed]
        strategy, num = place
        work = self.folder / f"{len(list(self.folder.iterdir()))}"
        work.mkdir()
        if begun is not None:
            shutil.copytree(begun.parents[1], work, dirs_exist_ok=True)
        with pytest.MonkeyPatch.context() as monkeypatch:
            sft = Sft(work, self.model, self.data, monkeypatch)
            settings = (*sft.settings, *SETTINGS, f"strategy={strategy}", *((KILLED,) if killed else ()))
            ended = sft.ranks(num, "train", *settings)
        assert ended.code == (-9 if killed else 0), ended.output
        if begun is not None:
            assert "resumed after step 4" in ended.output
        else:
            self.made[place, killed] = work / "runs" / "run"
        return work / "runs" / "run"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Lab:
    model = tmp_path_factory.mktemp("odd")
    shutil.copytree(model_folder, model, dirs_exist_ok=True)
    torch.manual_seed(0)
    tiny_llama(vocab_size=267, intermediate_size=61).save_pretrained(model)
    return Lab(tmp_path_factory.mktemp("lab"), model, data_file)


def last_files(folder: Path) -> dict[str, bytes]:
    """Weights, optimizer state and probes of the last checkpoint."""
    last = complete(folder / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in last.path.iterdir() if path.name != "callbacks.pt"}


def difference(folder: Path, other: Path) -> float:
    a, b = (complete(each / "checkpoints")[-1] for each in (folder, other))
    assert a.step == b.step == 6
    assert a.shapes == b.shapes
    return max(float((a.tensor(name) - b.tensor(name)).abs().max()) for name in a.shapes)


# More than two ranks add up in an order that hangs on where a gradient lies in which bucket.
@pytest.mark.parametrize(
    ("strategy", "num"),
    [
        ("ddp", 4),
        pytest.param("deepspeed_zero2_offload", 2, marks=pytest.mark.cpu_adam),
        ("deepspeed_zero2", 4),
        ("deepspeed_zero3", 2),
        ("fsdp2", 2),
    ],
)
def test_resumed_on_the_same_ranks_is_the_same_to_the_bit(lab: Lab, strategy: str, num: int) -> None:
    whole = lab.run((strategy, num), killed=False)
    again = lab.run((strategy, num), killed=False, begun=lab.run((strategy, num), killed=True))
    assert last_files(again) == last_files(whole)
    assert rows(again) == rows(whole)


@pytest.mark.cpu_adam
@pytest.mark.parametrize("strategy", ["deepspeed_zero2_offload", "deepspeed_zero3_offload", "deepspeed_zeropp"])
def test_those_that_a_certificate_leaves_out_make_the_same_numbers(lab: Lab, strategy: str) -> None:
    whole = lab.run(("single", 1), killed=False)
    assert difference(whole, lab.run((strategy, 2), killed=False)) < 1e-5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("single", 1), ("deepspeed_zero2", 2)),
        (("deepspeed_zero2", 2), ("ddp", 2)),
        (("deepspeed_zero3", 2), ("deepspeed_zero1", 4)),
        (("fsdp2", 2), ("deepspeed_zero3", 4)),
        (("deepspeed_zero3", 4), ("single", 1)),
        (("single", 1), ("fsdp2", 2)),
    ],
    ids=lambda place: f"{place[0]} on {place[1]}",
)
def test_resumed_elsewhere_goes_on_alike(lab: Lab, before: Place, after: Place) -> None:
    whole = lab.run(("single", 1), killed=False)
    again = lab.run(after, killed=False, begun=lab.run(before, killed=True))
    assert difference(whole, again) < (1e-5 if "deepspeed_zero3" in (before[0], after[0]) else 2e-6)
    assert [row["step"] for row in rows(again)] == [str(step) for step in range(7)]
    assert all(row["train/update_ratio/layers.1"] for row in rows(again)[1:])
    for one, other in zip(rows(whole), rows(again), strict=True):
        for key, value in one.items():
            if value:
                assert float(other[key]) == pytest.approx(float(value), rel=2e-5), (one["step"], key)


@pytest.mark.parametrize(
    ("strategy", "adapter"),
    [
        ("deepspeed_zero1", "none"),
        ("deepspeed_zero2", "none"),
        ("deepspeed_zero3", "none"),
        ("deepspeed_zero3", "lora"),
    ],
)
def test_in_bf16_a_run_begins_at_the_files_own_values(
    lab: Lab, tmp_path: Path, strategy: str, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Begun at their roundings they would be up to 0.4 % off, and a rate this low would never move them away.
    sft = Sft(tmp_path, lab.model, lab.data, monkeypatch)
    own = (f"strategy={strategy}", f"adapter={adapter}", "trainer.precision=bf16-mixed", "optimizer.lr=1e-30")
    ended = sft.ranks(2, "train", *sft.settings, *SETTINGS, *own, "max_steps=1")
    assert ended.code == 0, ended.output
    checkpoint = complete(sft.run_folder() / "checkpoints")[-1]
    expected = load_file(lab.model / "model.safetensors")
    if adapter == "lora":
        torch.manual_seed(0)
        expected = {name: initial(name, shape) for name, shape in checkpoint.shapes.items()}
    assert checkpoint.step == 1 and checkpoint.shapes.keys() == expected.keys()
    for name, weight in expected.items():
        assert float((checkpoint.tensor(name) - weight).abs().max()) < 1e-29, name
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in expected.values())


@pytest.mark.parametrize("strategy", ["single", "ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp2"])
def test_rotary_frequencies_stay_exact_in_bf16(
    lab: Lab, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rounded to bf16 they would be off by up to 0.4 %: at position 1000, by a whole radian and more.
    sft = Sft(tmp_path, lab.model, lab.data, monkeypatch)
    settings = (f"strategy={strategy}", "max_steps=1", "trainer.precision=bf16-true", "adapter=lora", FACTS)
    ended = sft.ranks(1, "train", *sft.settings, *SETTINGS, *settings)
    assert ended.code == 0, ended.output
    facts = json.loads((tmp_path / "facts0.json").read_text())
    assert set(facts["buffers"].values()) == {"torch.float32"}
    kept = {"lora" in name: dtype for name, dtype in facts["parameters"].items()}
    # DeepSpeed's optimizer has the adapter in fp32.
    assert kept == {False: "torch.bfloat16", True: "torch.bfloat16" if "zero" in strategy else "torch.float32"}


@pytest.mark.parametrize("strategy", ["deepspeed_zero3", "fsdp2"])
def test_a_sharded_model_is_what_it_should_be(
    lab: Lab, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = Sft(tmp_path, lab.model, lab.data, monkeypatch)
    settings = (f"strategy={strategy}", "max_steps=1", "trainer.precision=bf16-mixed", FACTS)
    ended = sft.ranks(2, "train", *sft.settings, *SETTINGS, *settings)
    assert ended.code == 0, ended.output
    ranks = [json.loads((tmp_path / f"facts{rank}.json").read_text()) for rank in (0, 1)]
    model = tiny_llama(vocab_size=267, intermediate_size=61)
    for facts in ranks:
        assert facts["training"] and facts["tied"]
        assert set(facts["buffers"].values()) == {"torch.float32"}
        # Weight decay by the true shape: a rank's share of a matrix looks like a vector to ZeRO-3.
        assert facts["decay"] == {name: 0.1 if p.ndim > 1 else 0.0 for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        shares = [facts["numel"][name] for facts in ranks]
        assert sum(shares) == parameter.numel()
        assert max(shares) - min(shares) <= max(1, parameter[0].numel())
    # bf16 is an approximation of fp32, not something else.
    exact = rows(lab.run(("single", 1), killed=False))[1]
    assert float(rows(sft.run_folder())[1]["train/loss"]) == pytest.approx(float(exact["train/loss"]), rel=1e-3)
