"""W&B gets each step once, whatever it has had of the run's earlier attempts."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.training import trackers

VALIDATED = {2: "0.5"}
HISTORY = [{"step": str(k), "train/loss": str(9 - k), "val/loss": VALIDATED.get(k, "")} for k in range(4)]


@pytest.mark.parametrize(("had", "sent"), [(0, [0, 1, 2, 3, 4, 5]), (2, [2, 3, 4, 5]), (5, [5])])
def test_only_what_is_missing_is_sent(had: int, sent: list[int], tmp_path: Path, monkeypatch: Any) -> None:
    import wandb

    logged: list[tuple[int, dict[str, float]]] = []

    class Fake(wandb.Run):
        starting_step = had

        def __init__(self) -> None:
            self._settings = SimpleNamespace()

        def __del__(self) -> None:
            pass

        def define_metric(self, *_: Any, **__: Any) -> None:
            pass

        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics))

    asked: dict[str, Any] = {}
    monkeypatch.setattr(wandb, "init", lambda **options: asked.update(options) or Fake())
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.delenv("WANDB_MODE")
    options: dict[str, Any] = {"group": "g", "project": "p", "mode": "auto"}
    logger = trackers.wandb_logger(run="r", folder=tmp_path, history=HISTORY, **options)
    for step in (4, 5):
        logger.log_metrics({"train/loss": 1.0}, step=step)
    assert (asked["id"], asked["resume"], asked["mode"], asked["group"]) == ("r", "allow", "online", "g")
    assert [step for step, _ in logged] == sent
    rows = dict(logged)
    if had <= 2:
        assert rows[2] == {"train/loss": 7.0, "val/loss": 0.5, "trainer/global_step": 2}
        assert rows[3] == {"train/loss": 6.0, "trainer/global_step": 3}
