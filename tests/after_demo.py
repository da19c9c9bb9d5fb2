"""What the demo leaves to be shown: its report, and what W&B has of it. CI runs this after `make demo`."""

import html
import json
from pathlib import Path

import offline
from sft.runs import answers_file
from sft.runs.metrics_file import Metrics

DEMO = Path("runs/demo")


def test_wandb_has_configuration_tags_answers_and_files() -> None:
    begun, config = offline.run(DEMO), offline.config(DEMO)
    assert (begun["project"], begun["job_type"], begun["tags"]) == ("sft", "train", ["demo"])
    assert config["optimizer"]["lr"] == 2e-3
    assert config["recipe"] == json.loads((DEMO / "recipe.json").read_text())
    assert config["ledger"] == json.loads((DEMO / "data.json").read_text())
    answers = answers_file.read(DEMO)
    table = offline.table(DEMO, "samples")
    columns = [table["columns"].index(name) for name in ("step", "prompt", "base", "answer")]
    assert [[row[at] for at in columns] for row in table["data"]] == [
        [each["step"], each["prompt"], each["base"], each["answer"]] for each in answers
    ]
    (files,) = (each["files"] for each in offline.artefacts(DEMO) if each["type"] == "run")
    assert files.keys() >= {"preview.html", "data.json", "report.html", "samples.jsonl"}
    metrics = Metrics.read(DEMO / "metrics.csv")
    assert offline.summary(DEMO)["val/loss"] == {"min": metrics.lowest("val/loss"), "last": metrics.last("val/loss")}
    assert len(offline.history(DEMO)) >= metrics.step


def test_the_report_has_answers_of_base_and_tuned() -> None:
    page = (DEMO / "report.html").read_text()
    last = [each for each in answers_file.read(DEMO) if each["step"] == Metrics.read(DEMO / "metrics.csv").step]
    assert last and all(html.escape(each[part]) in page for each in last for part in ("prompt", "answer"))
    assert sum(each["answer"] == each["reference"] for each in last) >= len(last) - 1
    assert sum(each["base"] == each["reference"] for each in last) <= 1
