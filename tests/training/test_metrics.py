from pathlib import Path

import pytest

from sft.training.metrics import COLUMNS, MetricsFile


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
