"""TensorBoard: curves, hyperparameters beside the values they led to, and answers as text."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from sft.runs.answers_file import Answer
from sft.runs.identity import flatten
from sft.training.trackers import about


class TensorBoard(TensorBoardLogger):
    """Lightning's, with the settings and the best and last values in the HPARAMS tab."""

    def __init__(self, folder: Path, again: int, config: Mapping[str, Any]) -> None:
        super().__init__(save_dir=folder, name="tensorboard", version="", purge_step=again, default_hp_metric=False)
        self.folder, self.config = folder, config
        if threading.excepthook is threading.__excepthook__:
            threading.excepthook = _told
        self.extremes, self.step = about.Extremes(), 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(dict(metrics), step)
        self.note(metrics, int(step or 0))

    def note(self, metrics: Mapping[str, float], step: int) -> None:
        self.extremes.note(metrics)
        self.step = step

    @rank_zero_only
    def log_answers(self, step: int, answers: list[Answer]) -> None:
        for answer in answers:
            text = "".join(f"**{part}**\n\n    {_indented(answer[part])}\n\n" for part in ("prompt", "reference"))
            text += f"**answer** (score {answer['score']:.2f})\n\n    {_indented(answer['answer'])}\n"
            self.experiment.add_text(f"samples/{answer['number']}", text, step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        values = {f"last/{name}": value for name, value in self.extremes.last.items()}
        values |= {f"best/{name}": value for name, value in self.extremes.best.items()}
        if values:
            told = flatten(about.configuration(self.folder, self.config))
            kept = {name: value for name, value in told.items() if not name.startswith(("ledger.", "versions."))}
            kept = {name: "null" if value is None else value for name, value in kept.items()}
            self.log_hyperparams(kept, values, self.step)
        super().finalize(status)


def _told(failed: threading.ExceptHookArgs) -> None:
    """The thread that writes TensorBoard's file fails without a traceback: the next call raises its error."""
    if type(failed.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(failed)


def _indented(text: str) -> str:
    return text.replace("\n", "\n    ")


def tensorboard_logger(
    *,
    run: str,
    folder: Path,
    history: Sequence[Mapping[str, str]],
    config: Mapping[str, Any] | None = None,
) -> TensorBoardLogger:
    """TensorBoard, in `FOLDER/tensorboard`; a resumed run hides the steps that it repeats."""
    again = int(history[-1]["step"]) + 1 if history else 0
    logger = TensorBoard(folder, again, config or {})
    for row in history:
        logger.note({name: float(value) for name, value in row.items() if name != "step" and value}, int(row["step"]))
    return logger
