from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_llama
from sft.checkpoint import checkpoint as checkpoints
from sft.checkpoint import save as saving
from sft.checkpoint.layout import Whole
from sft.errors import UserError
from sft.model.optimizer import build
from sft.runs import manifest


def trained(seed: int = 0, factory: Any = torch.optim.AdamW, **changes: object) -> Whole:
    """A model after one step, with its optimizer."""
    torch.manual_seed(seed)
    model = tiny_llama(**changes)
    optimizer = build(model, partial(factory, lr=0.1, weight_decay=0.1))
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return Whole(model, optimizer)


def save(folder: Path, step: int, layout: Whole, val_loss: float | None = None) -> checkpoints.Checkpoint:
    state = {"num_steps": 9, "stopped": False, "val_loss": val_loss}
    return saving.save(folder, step, layout, {}, state, {"probes": []})


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_saved_and_restored_go_on_alike(tmp_path: Path, factory: Any) -> None:
    layout, other = trained(0, factory), trained(1, factory)
    save(tmp_path, 1, layout).restore(other)
    for trainee in (layout, other):
        trainee.model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        trainee.optimizer.step()
    for (name, tensor), expected in zip(other.model.named_parameters(), layout.model.parameters(), strict=True):
        assert torch.equal(tensor, expected), name


def test_names_are_those_of_the_model_and_tied_weights_once(tmp_path: Path) -> None:
    layout = trained()
    saved = save(tmp_path, 1, layout)
    names = dict(layout.model.named_parameters()).keys()
    assert saved.shapes.keys() == names
    assert "lm_head.weight" not in names
    (shard,) = saved.path.glob("shard-*.safetensors")
    keys = {tuple(key.split("|")) for key in load_file(shard)}
    assert keys == {(name, field, "0") for name in names for field in ("weight", "exp_avg", "exp_avg_sq", "step")}
    assert [group["weight_decay"] for group in saved.state["groups"]] == [0.1, 0.0]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, trained())
    with pytest.raises(UserError, match=r"another model: .* has shape"):
        saved.restore(trained(hidden_size=64))
    with pytest.raises(UserError, match=r"another model: lm_head\.weight differ"):
        saved.restore(trained(tie_word_embeddings=False))


def test_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    layout = trained()
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.0, 4.0], start=1):
        save(tmp_path, step, layout, loss)
        checkpoints.prune(tmp_path, keep_last=2)
    assert [each.step for each in checkpoints.complete(tmp_path)] == [2, 5, 6]
    best = checkpoints.best(checkpoints.complete(tmp_path))
    assert best is not None and best.step == 2  # the earlier of two equals


def test_half_written_is_never_seen_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = trained()
    save(tmp_path, 1, layout)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(saving, "flush", fail)
        with pytest.raises(RuntimeError):
            save(tmp_path, 2, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (tmp_path / ".unfinished-step-00000003").mkdir()  # of a killed process
    (tmp_path / ".unfinished-step-00000005").touch()  # of whatever
    latest = checkpoints.latest(tmp_path)
    assert latest is not None and latest.step == 1
    save(tmp_path, 4, layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, trained())
    assert saved.verify() == []
    (shard,) = saved.path.glob("shard-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # one bit
    shard.write_bytes(content)
    assert saved.verify() == [f"{shard} is damaged (its checksum is another)"]


def test_pieces_of_any_size_make_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What five ranks write of a model that each of them holds, read as a whole and in ranges."""
    layout = trained()
    staging = tmp_path / "step-00000001"
    staging.mkdir()
    names = [f"shard-{rank:05d}-of-00005.safetensors" for rank in range(5)]
    files = {name: saving._write_shard(staging / name, layout, rank, 5) for rank, name in enumerate(names)}
    sizes = [path.stat().st_size for path in staging.iterdir()]
    assert max(sizes) < 1.2 * min(sizes)
    document = {"format": checkpoints.FORMAT, "step": 1, "num_steps": 9, "stopped": False, "val_loss": None}
    manifest.write_sealed(staging / "state.json", document | saving._description(layout) | {"files": sorted(files)})
    whole = checkpoints.Checkpoint(staging)
    for name, parameter in layout.model.named_parameters():
        assert torch.equal(whole.tensor(name), parameter), name
        values = torch.empty(7)
        whole.read(name, "exp_avg", 11, values)
        assert torch.equal(values, layout.optimizer.state[parameter]["exp_avg"].view(-1)[11:18])


@pytest.mark.parametrize("killed", ["never", "before the new state", "before the old files go"])
def test_dropped_states_leave_a_complete_checkpoint_at_each_moment(
    tmp_path: Path, killed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = trained()
    saved = save(tmp_path, 1, layout)
    size = sum(path.stat().st_size for path in saved.path.iterdir())

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if killed != "never":
        with monkeypatch.context() as patch:
            name = "sft.runs.manifest.write_sealed" if killed == "before the new state" else "pathlib.Path.unlink"
            patch.setattr(name, kill)
            with pytest.raises(KeyboardInterrupt):
                saving.drop_optimizer(checkpoints.Checkpoint(saved.path))
        for name, parameter in layout.model.named_parameters():
            assert torch.equal(checkpoints.Checkpoint(saved.path).tensor(name), parameter)
    saving.drop_optimizer(checkpoints.Checkpoint(saved.path))
    left = checkpoints.Checkpoint(saved.path)
    assert left.faults() == []
    for name, parameter in layout.model.named_parameters():
        assert torch.equal(left.tensor(name), parameter)
    assert sum(path.stat().st_size for path in saved.path.iterdir()) < 0.4 * size
    with pytest.raises(UserError, match="can't be resumed: its optimizer states were dropped"):
        left.restore(trained(1))
