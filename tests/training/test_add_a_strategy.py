"""A strategy is added by a class with a layout and a file in conf/strategy/: nothing else knows which there are."""

import shutil
from itertools import pairwise

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from safetensors import safe_open

from running import Sft
from sft.checkpoint.checkpoint import Checkpoint, complete
from sft.checkpoint.layout import Whole
from sft.errors import UserError
from sft.training.strategies import DDP, placement

SETTINGS = ("epochs=2", "checkpoint.save_every=2", "checkpoint.keep_last=9", "micro_batch_size=1", "export=false")
KILL = "+callbacks.kill={_target_: mishaps.Mishap, step: 4, rank: null, what: kill}"


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.shapes}


def test_a_strategy_of_ones_own_makes_the_same_weights_and_resumes_anywhere(sft: Sft) -> None:
    (sft.folder / "conf" / "strategy").mkdir(parents=True)
    (sft.folder / "conf" / "strategy" / "dealt.yaml").write_text("_target_: dealt.DealtStrategy\n")
    own = (f"hydra.searchpath=[file://{sft.folder / 'conf'}]", "strategy=dealt")
    train = ("train", *sft.settings, *SETTINGS)
    killed = sft.ranks(2, *train, "run=own", *own, KILL)
    assert killed.code == -9, killed.output
    (first,) = complete(sft.run_folder("own") / "checkpoints")
    names = []
    for path in sorted(first.path.glob("shard-*")):
        with safe_open(path, "pt") as shard:
            names.append({key.split("|")[0] for key in shard.keys()})  # noqa: SIM118  it is no mapping
    assert all(names) and all(one.isdisjoint(other) for one, other in pairwise(names))
    assert set.union(*names) == first.shapes.keys()
    shutil.copytree(sft.run_folder("own"), sft.run_folder("alone"))
    last = {}
    for run, num_ranks, settings in (
        ("own", 2, own),
        ("ddp", 2, ("strategy=ddp",)),
        ("alone", 1, ("strategy=single",)),  # resumed by one that keeps everything whole
    ):
        ended = sft.ranks(num_ranks, *train, f"run={run}", *settings)
        assert ended.code == 0, ended.output
        assert ("resumed after step 2" in ended.output) == (run != "ddp")
        last[run] = weights(complete(sft.run_folder(run) / "checkpoints")[-1])
    for name, expected in last["ddp"].items():
        assert torch.equal(last["own"][name], expected), name
        torch.testing.assert_close(last["alone"][name], expected, rtol=0, atol=1e-5, msg=name)


def test_a_strategy_that_shards_and_does_not_say_how_is_refused() -> None:
    assert placement(DDP()).layout is Whole
    with pytest.raises(UserError, match="FSDPStrategy doesn't say where it keeps weights"):
        placement(FSDPStrategy())
