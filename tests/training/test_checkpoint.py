from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from conftest import tiny_llama
from sft.errors import UserError
from sft.model.optimizer import build
from sft.training import checkpoint as checkpoints


def trained(seed: int = 0, factory: Any = torch.optim.AdamW) -> tuple[Any, Any]:
    """A model after one step, and its optimizer."""
    torch.manual_seed(seed)
    model = tiny_llama()
    optimizer = build(model, partial(factory, lr=0.1, weight_decay=0.1))
    model(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def save(folder: Path, step: int, model: Any, optimizer: Any, val_loss: float | None = None) -> Any:
    state = {"num_steps": 9, "stopped": False, "val_loss": val_loss}
    return checkpoints.save(folder, step, model, optimizer, {}, state, [])


@pytest.mark.parametrize("factory", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_saved_and_restored_go_on_alike(tmp_path: Path, factory: Any) -> None:
    model, optimizer = trained(0, factory)
    saved = save(tmp_path, 1, model, optimizer)
    other, other_optimizer = trained(1, factory)
    saved.restore_model(other)
    saved.restore_optimizer(other_optimizer)
    for each, its in ((model, optimizer), (other, other_optimizer)):
        each(torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
        its.step()
    for (name, tensor), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(tensor, expected), name


def test_names_are_those_of_the_model_and_tied_weights_once(tmp_path: Path) -> None:
    model, optimizer = trained()
    saved = save(tmp_path, 1, model, optimizer)
    weights = load_file(saved.path / "model.safetensors")
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert "lm_head.weight" not in weights
    states = load_file(saved.path / "optimizer.safetensors")
    assert {key.rpartition("|")[2] for key in states} == {"exp_avg", "exp_avg_sq", "step"}
    assert {key.rpartition("|")[0] for key in states} == set(weights)
    assert [group["weight_decay"] for group in saved.state["groups"]] == [0.1, 0.0]


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1, *trained())
    with pytest.raises(UserError, match=r"another model: .* has shape"):
        saved.restore_model(tiny_llama(hidden_size=64))
    with pytest.raises(UserError, match=r"another model: lm_head\.weight differ"):
        saved.restore_model(tiny_llama(tie_word_embeddings=False))


def test_last_ones_and_the_best_stay(tmp_path: Path) -> None:
    model, optimizer = trained()
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 1.0, 4.0], start=1):
        save(tmp_path, step, model, optimizer, loss)
        checkpoints.prune(tmp_path, keep_last=2)
    assert [each.step for each in checkpoints.complete(tmp_path)] == [2, 5, 6]
    best = checkpoints.best(checkpoints.complete(tmp_path))
    assert best is not None and best.step == 2  # the earlier of two equals


def test_half_written_is_never_seen_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "flush", fail)
        with pytest.raises(RuntimeError):
            save(tmp_path, 2, model, optimizer)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    (tmp_path / ".unfinished-step-00000003").mkdir()  # of a killed process
    latest = checkpoints.latest(tmp_path)
    assert latest is not None and latest.step == 1
    save(tmp_path, 4, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]
