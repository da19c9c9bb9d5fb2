import json
import time
from pathlib import Path

import numpy as np
import pytest

from runfiles import rows
from running import Sft
from sft.training import datamodule, speed
from sft.training.metrics_file import COLUMNS, MetricsFile

SETTINGS = ("epochs=2", "val_every=2", "data.val_size=0", "export=false")


def steps(path: Path) -> list[str]:
    return [line.partition(",")[0] for line in path.read_text().splitlines()[1:]]


def test_a_row_a_step_with_its_validation_in_it(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.resume(0)
    file.log_metrics({"val/loss": 2.0}, step=0)
    file.log_metrics({"train/loss": 1.5}, step=1)
    file.log_metrics({"train/loss": 1.25, "epoch": 0}, step=2)
    file.log_metrics({"val/loss": 1.0}, step=2)
    lines = file.path.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert steps(file.path) == ["0", "1", "2"]
    assert lines[3].startswith("2,1.25,") and lines[3].endswith(",1.0,")
    metrics = file.metrics
    assert (metrics.first("val/loss"), metrics.last("val/loss"), metrics.median("train/loss")) == (2.0, 1.0, 1.375)


@pytest.mark.parametrize("torn", ["", "3,0.", "3"], ids=["whole", "half a row", "half a number"])
def test_resume_drops_what_comes_after(tmp_path: Path, torn: str) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.resume(0)
    for step in range(4):
        file.log_metrics({"train/loss": 1.0 / (step + 1)}, step=step)
    with file.path.open("a") as end:
        end.write(torn)
    again = MetricsFile(file.path)
    again.resume(2)
    assert steps(file.path) == ["0", "1", "2"]
    again.log_metrics({"train/loss": 0.125}, step=3)
    assert steps(file.path) == ["0", "1", "2", "3"]
    assert again.metrics.last("train/loss") == 0.125


def test_a_fresh_start_keeps_nothing(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"val/loss": 1.0}, step=0)
    again = MetricsFile(file.path)
    again.resume(0)
    assert steps(file.path) == []


def test_a_metric_of_ones_own_gets_a_column(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    file.log_metrics({"train/loss": 1.0}, step=1)
    file.log_metrics({"train/loss": 1.0, "mine": 7.0}, step=2)
    lines = file.path.read_text().splitlines()
    assert lines[0].endswith(",mine")
    assert lines[1].endswith(",") and lines[2].endswith(",7.0")


def test_what_a_run_counts_is_the_plain_sum_and_goes_on_after_a_resume(sft: Sft) -> None:
    groups = "parameters.groups=[{match: '*embed*', lr: 1e-3}, {match: '*norm*', weight_decay: 0.1}]"
    settings = (*SETTINGS, "trainer.gradient_clip_val=1.7", groups)
    assert sft.train("run=whole", *settings) == 0
    time_is_up = ("+callbacks.up={_target_: mishaps.TimeIsUp, step: 4}", "max_time=100:00:00")
    assert sft.train("run=run", *settings, *time_is_up) == 75
    assert sft.train("run=run", *settings, "micro_batch_size=1") == 0
    whole, again = rows(sft.run_folder("whole")), rows(sft.run_folder())
    counted = ("clipped", "clipped_share", "tokens", "supervised_tokens", "epoch", "lr", "lr/embed")
    for one, other in zip(whole, again, strict=True):
        assert {name: one[f"train/{name}"] for name in counted} == {name: other[f"train/{name}"] for name in counted}
    norms, clipped, shares, tokens, supervised, epochs = (
        [float(row[f"train/{name}"]) for row in whole]
        for name in ("grad_norm", "clipped", "clipped_share", "tokens", "supervised_tokens", "epoch")
    )
    assert clipped == [norm > 1.7 for norm in norms] and 0 < sum(clipped) < len(norms) == 6
    assert shares == [sum(clipped[: step + 1]) / (step + 1) for step in range(6)]
    (source,) = json.loads((sft.run_folder() / "data.json").read_text())["train"]["sources"]
    assert (tokens[2], tokens[5]) == (source["tokens"], 2 * source["tokens"])
    assert (supervised[2], supervised[5]) == (source["supervised_tokens"], 2 * source["supervised_tokens"])
    assert (epochs[2], epochs[5]) == (1, 2)
    of_steps = [float(row["train/supervised_share"]) for row in whole]
    assert np.diff([0, *supervised]) == pytest.approx(of_steps * np.diff([0, *tokens]))
    assert [row["train/lr/embed"] for row in whole] == [repr(float(row["train/lr"]) / 10) for row in whole]
    assert not [column for column in whole[0] if "norm*" in column or column == "train/lr/norm"]


def test_speed_waiting_and_useful_operations_are_those_of_the_step(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    made = datamodule.make_batch

    def slowly(*arguments: object) -> object:
        time.sleep(0.05)
        return made(*arguments)

    monkeypatch.setattr(datamodule, "make_batch", slowly)
    monkeypatch.setattr(speed, "device_peak", lambda device, precision: 1e9)
    assert sft.train("run=run", *SETTINGS, "max_steps=2", "data.packing=false") == 0
    steps = MetricsFile(sft.run_folder() / "metrics.csv")
    steps.resume(2)
    values = [{name: float(text) for name, text in row.items() if text} for row in steps.metrics.rows]
    before = 0.0
    for step in values:
        seconds, tokens = step["train/seconds"], step["train/tokens"] - before
        before = step["train/tokens"]
        assert step["train/tokens_per_second"] == pytest.approx(tokens / seconds)
        assert 0.1 < step["train/data_wait"] * seconds < seconds  # two micro-batches
        assert 0.05 < step["train/memory_peak"] < 100
        # 2 layers of 32 channels: q and o 32 x 32, k and v 32 x 16, three of 32 x 64; a head of 264 tokens.
        weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
        least = 6 * weights * tokens + 6 * 264 * 32 * step["train/supervised_share"] * tokens
        attention = step["train/mfu"] * seconds * 1e9 - least
        # 4 samples of about 50 tokens: the sum of their squares is at least that of equal ones.
        assert tokens**2 / 4 <= attention / (6 * 2 * 32) < 1.2 * tokens**2 / 4
