"""Tells people that a job ended and isn't requeued. The batch script's own step calls it, so it is quick, imports
neither torch nor Lightning, and never fails."""

import json
import os
from contextlib import suppress
from pathlib import Path

from sft.runs import events
from sft.training.trackers import wandb_server
from sft.training.trackers.waiting import within

MUTATION = """mutation Alert($entityName: String!, $projectName: String!, $runName: String!, $title: String!,
$text: String!, $severity: AlertSeverity = WARN) { notifyScriptableRunAlert(input: {entityName: $entityName,
projectName: $projectName, runName: $runName, title: $title, text: $text, severity: $severity}) { success } }"""
LONGEST = 5.0  # seconds


def gave_up(folder: Path, step: int, text: str) -> None:
    """An event of the run and, if W&B has the run online, an alert there."""
    title = "Not requeued"
    with suppress(OSError):
        events.record(folder, "alert", step=step, title=title, text=text)
    file = folder / "wandb" / "online.json"
    if file.is_file() and os.environ.get("WANDB_MODE", "online") == "online":
        within(LONGEST, lambda: _send(file, title, text), None)


def _send(file: Path, title: str, text: str) -> None:
    with suppress(Exception):  # of a file that was cut short, of wandb's settings, of the network
        from wandb.sdk import wandb_setup

        settings = wandb_setup.singleton().settings  # without wandb's process
        place = json.loads(file.read_text())
        names = {"entityName": place["entity"], "projectName": place["project"], "runName": place["run"]}
        wandb_server.ask(
            settings, wandb_server.find_key(settings), MUTATION, {**names, "title": title, "text": text[:1000]}
        )
