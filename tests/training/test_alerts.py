"""What people are told of while a run goes on."""

import random
import time
from pathlib import Path

import pytest

from sft.errors import NotFinite
from sft.runs import events
from sft.training.trackers import choose, nodes, notify, wandb_server
from sft.training.trackers.alerts import Alerts
from wandb_server import KEY, Service


class Told:
    def __init__(self) -> None:
        self.titles: list[str] = []

    def alert(self, title: str, text: str) -> None:
        self.titles.append(title)


def watch(folder: Path, column: str, values: list[float]) -> tuple[list[tuple[int, str]], list[str]]:
    """Step and title of each alert in the events of a run with these values, and what a tracker was told."""
    told = Told()
    alerts = Alerts(folder, [told], [])  # type: ignore[list-item]
    for step, value in enumerate(values, 1):
        alerts.log_metrics({column: value}, step)
    return [(event["step"], event["title"]) for event in events.read(folder)], told.titles


def noise(length: int) -> list[float]:
    draw = random.Random(0)
    return [2 + draw.gauss(0, 0.1) for _ in range(length)]


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        (noise(1000), []),
        ([2 * 0.99**k for k in range(300)], []),
        ([*noise(60), 3.5, *noise(60)], [61]),
        ([*noise(60), 3.5, 3.6, 3.7, *noise(100), 3.5], [61, 164]),
        ([*noise(10), 9.0], []),  # too early to know
    ],
    ids=["noise", "learning", "spike", "not each step", "early"],
)
def test_a_loss_that_spikes(losses: list[float], steps: list[int], tmp_path: Path) -> None:
    found, told = watch(tmp_path, "train/loss", losses)
    assert found == [(step, "Loss spikes") for step in steps]
    assert told == ["Loss spikes"] * len(steps)


@pytest.mark.parametrize(
    ("speeds", "steps"),
    [
        ([9.0] * 200, []),
        ([9.0] * 50 + [1.0] * 19 + [9.0] * 30, []),  # a save
        ([9.0] * 50 + [1.0] * 40, [70]),
        ([9.0] * 50 + [4.0] * 40, []),
    ],
)
def test_training_that_stalls(speeds: list[float], steps: list[int], tmp_path: Path) -> None:
    found, _ = watch(tmp_path, "train/tokens_per_second", speeds)
    assert found == [(step, "Training is slow") for step in steps]


@pytest.mark.parametrize(
    ("shares", "steps"),
    [([0.0, 0.01, 0.02], []), ([0.1, 0.9, 0.95, 0.6], []), ([0.1, 0.9, 0.4, 0.3], [3])],
)
def test_stop_tokens_that_fail(shares: list[float], steps: list[int], tmp_path: Path) -> None:
    found, _ = watch(tmp_path, "val/stop_recall", shares)
    assert found == [(step, "Stop tokens fail") for step in steps]


def test_a_resumed_run_tells_no_one_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses = [*noise(60), 3.5]
    watch(tmp_path, "train/loss", losses)
    assert capsys.readouterr().out.startswith(
        "alert: Loss spikes: step 61: the loss is 3.5000, where the last 60 steps "
    )
    history = [{"step": str(step), "train/loss": str(loss)} for step, loss in enumerate(losses[:50], 1)]
    again = Alerts(tmp_path, [], history)
    for step in range(51, 62):
        again.log_metrics({"train/loss": losses[step - 1]}, step)
    assert len(events.read(tmp_path)) == 1
    assert capsys.readouterr().out == ""


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    told = Told()

    def train() -> None:
        with choose.tracking() as trackers:
            trackers.append(Alerts(tmp_path, [told], []))  # type: ignore[list-item]
            raise NotFinite("step 3: the loss is nan")

    with pytest.raises(NotFinite):
        train()
    (event,) = events.read(tmp_path)
    assert (event["event"], event["title"], event["text"]) == (
        "alert",
        "Loss is not a number",
        "step 3: the loss is nan",
    )
    assert told.titles == ["Loss is not a number"]


def test_every_node_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 8 of two nodes, in one process."""
    gpus = tmp_path / "bin" / "nvidia-smi"
    gpus.parent.mkdir()
    gpus.write_text("#!/bin/sh\necho '97, 70123, 650.5'\necho '0, 1, [N/A]'\n")
    gpus.chmod(0o755)
    monkeypatch.setenv("PATH", str(gpus.parent), prepend=":")
    made = []
    for host in ("n1", "n2"):
        monkeypatch.setattr(nodes.socket, "gethostname", lambda host=host: host)
        made.append(nodes.Nodes(tmp_path, []))
        while not (tmp_path / "logs" / "nodes" / f"{host}.json").exists():
            time.sleep(0.01)
    logged: list[tuple[dict[str, float], int | None]] = []

    class Tracker:
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            logged.append((metrics, step))

    made[0].trackers = [Tracker()]  # type: ignore[list-item]
    made[0].log_metrics({"train/loss": 1.0}, 4)
    made[0].log_metrics({"train/loss": 1.0}, 5)  # not each step
    for each in made:
        each.finalize("success")
    ((values, step),) = logged
    assert step == 4
    for node in ("n1", "n2"):
        assert 0 < values[f"system/{node}/memory"] < 100 and 0 <= values[f"system/{node}/cpu"] <= 100
        assert (values[f"system/{node}/gpu0"], values[f"system/{node}/gpu0_mib"]) == (97, 70123)
        assert (values[f"system/{node}/gpu0_watt"], values[f"system/{node}/gpu1"]) == (650.5, 0)
        assert f"system/{node}/gpu1_watt" not in values
    old = tmp_path / "logs" / "nodes" / "n2.json"
    old.write_text('{"time": 0, "cpu": 1.0}')
    assert not [name for name in nodes.latest(old.parent) if "/n2/" in name]


@pytest.mark.parametrize("fault", [None, "hang", 500, "vanish", "offline"])
def test_a_job_that_is_not_requeued(
    fault: str | int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    service = Service()
    monkeypatch.setenv("WANDB_BASE_URL", service.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb_server, "ANSWER", 1.0)
    import wandb

    wandb.teardown()
    if fault != "offline":
        (tmp_path / "wandb").mkdir()
        (tmp_path / "wandb" / "online.json").write_text('{"entity": "me", "project": "sft", "run": "r-1"}')
        service.fault = fault
    begun = time.monotonic()
    notify.gave_up(tmp_path, 3, "killed: 3 of 3 requeues are used")
    assert time.monotonic() - begun < 20
    assert [(event["event"], event["step"]) for event in events.read(tmp_path)] == [("alert", 3)]
    sent = [("r-1", "Not requeued", "killed: 3 of 3 requeues are used")] if fault is None else []
    assert service.alerts == sent
    assert capsys.readouterr() == ("", "")
    wandb.teardown()
    service.vanish()
