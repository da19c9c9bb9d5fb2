"""Experiment trackers: Lightning's own loggers, given the run's name and folder."""

import netrc
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from sft.errors import UserError
from sft.runs.signals import shielded
from sft.training.log import log


def wandb_logger(
    *, run: str, folder: Path, group: str, history: Sequence[Mapping[str, str]], project: str, mode: str
) -> WandbLogger:
    """Weights & Biases; `mode=auto` is online if a W&B key is found, else offline.

    One W&B run, however often this run is resumed, with each step exactly once. A resumed run repeats the steps after
    its checkpoint, to the same bits: online, steps that W&B has already are left out. An offline W&B run can't be
    resumed, so it is written anew. Steps that W&B lacks come from `history`, the rows of metrics.csv.

    `WANDB_MODE` in the environment takes precedence over `mode`. If the service can't be reached, the run is logged
    offline.
    """
    if mode not in ("auto", "online", "offline"):
        raise UserError(f"logger.mode={mode} is unknown: set auto, online or offline")
    mode = os.environ.get("WANDB_MODE") or mode
    if mode == "auto":
        mode = "online" if _logged_in() else "offline"
    elif mode == "online" and not _logged_in():
        raise UserError("logger.mode=online needs a W&B key: run `wandb login`, or set logger.mode=offline")
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return WandbLogger(offline=True)  # a dummy: only the first rank logs

    import wandb

    class Steps(WandbLogger):
        lost = False

        @rank_zero_only
        def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
            if self.lost or int(step or 0) < first:
                return
            try:
                experiment.log({**metrics, "trainer/global_step": step}, step=step)
            except Exception as error:  # no failure of a tracker ends a run
                log(f"W&B failed; the run continues without it until it is resumed: {error}")
                self.lost = True

    def start(mode: str) -> wandb.Run:
        if mode == "offline":
            for earlier in (folder / "wandb").glob(f"offline-run-*-{run}"):
                shutil.rmtree(earlier)
        with shielded():  # W&B's own process
            return wandb.init(
                project=project,
                name=run,
                group=group,
                id=run,
                resume="allow",
                dir=str(folder),
                mode=mode,  # type: ignore[arg-type]
                settings=wandb.Settings(silent=True, console="off", init_timeout=30),
            )

    try:
        experiment = start(mode)
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        log(f"W&B can't be reached, so this run is logged offline: {' '.join(str(error).split())[:200]}")
        experiment = start("offline")
    experiment.define_metric("trainer/global_step")
    experiment.define_metric("*", step_metric="trainer/global_step")
    first = experiment.starting_step
    logger = Steps(experiment=experiment)
    for row in history:
        values = {name: float(value) for name, value in row.items() if name != "step" and value}
        logger.log_metrics(values, step=int(row["step"]))
    return logger


@contextmanager
def tracking() -> Iterator[None]:
    """Finishes the W&B run, if there is one, at the end: the next run of a multirun must not continue it."""
    try:
        yield
    finally:
        wandb = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.finish()
            except Exception as error:
                log(f"W&B couldn't be finished: {error}")


def _logged_in() -> bool:
    """Whether wandb has a key, in the environment or in the netrc file for its host. No server is asked."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def tensorboard_logger(
    *, run: str, folder: Path, group: str, history: Sequence[Mapping[str, str]]
) -> TensorBoardLogger:
    """TensorBoard, in `FOLDER/tensorboard`; a resumed run hides the steps that it repeats."""
    again = int(history[-1]["step"]) + 1 if history else 0
    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", purge_step=again)
