"""Experiment trackers: Lightning's own loggers, given the run's name and folder."""

import json
import os
import secrets
import shutil
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from ssl import SSLCertVerificationError
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from sft.errors import UserError
from sft.runs.files import write_text
from sft.runs.signals import shielded
from sft.training.log import log

# Seconds for which W&B may hold up a run: to answer at all, to begin its run once it has answered, and to end it.
ANSWER, BEGIN, END = 3.0, 6.0, 15.0


def wandb_logger(
    *,
    run: str,
    folder: Path,
    group: str,
    history: Sequence[Mapping[str, str]],
    project: str,
    mode: str,
    config: Mapping[str, Any] | None = None,
    entity: str | None = None,
    tags: Sequence[str] | str | None = None,
    notes: str | None = None,
    job_type: str | None = None,
) -> WandbLogger:
    """Weights & Biases; `mode=auto` is online if wandb finds a key, unless `wandb offline` was called, else offline.

    One W&B run, however often this run is resumed, with each step exactly once; a folder that is begun anew is another
    W&B run. A resumed run repeats the steps after
    its checkpoint, to the same bits: online, steps that W&B has already are left out. An offline W&B run can't be
    resumed, so it is written anew. Steps that W&B lacks come from `history`, the rows of metrics.csv. `config` is the
    W&B run's configuration; the latest start's values count.

    `WANDB_MODE` in the environment takes precedence over `mode`. If the server can't be reached or refuses the key,
    the run is logged offline until it is started again. Raises UserError if `mode=online` without a key, and if wandb
    refuses its own settings or those given here.
    """
    mode = os.environ.get("WANDB_MODE") or mode
    first_rank = rank_zero_only.rank == 0  # type: ignore[attr-defined]
    if first_rank or mode == "online":
        try:
            settings = _settings()
            key = _key(settings) if mode in ("auto", "online") else None
        except Exception as error:
            raise UserError(f"wandb's settings are wrong, correct them or set logger=csv: {_line(error)}") from error
        if mode == "auto":
            mode = settings.mode if key or settings.mode != "online" else "offline"
        elif mode == "online" and not key:
            raise UserError("logger.mode=online needs a W&B key: run `wandb login`, or set logger.mode=offline")
    if not first_rank:
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

    identity = _identity(folder, run)

    def start(mode: str) -> wandb.Run:
        options: dict[str, Any] = {"silent": True, "console": "off", "init_timeout": BEGIN}
        # Offline nothing is waited for but the disk. Older versions decide by themselves.
        if mode == "online" and "finish_timeout" in wandb.Settings.model_fields:
            options |= {"finish_timeout": END, "finish_timeout_raises": True}
        with shielded():  # W&B's own process
            return wandb.init(
                project=project,
                entity=entity,
                name=run,
                group=group,
                job_type=job_type,
                tags=[tags] if isinstance(tags, str) else tags and [str(tag) for tag in tags],
                notes=notes,
                config=dict(config or {}),
                id=identity,
                resume="allow",
                dir=str(folder.absolute()),  # its process may have another working folder
                mode=mode,  # type: ignore[arg-type]
                settings=options,
            )

    def forget() -> None:
        """What an earlier start has logged offline: `history` has all of it."""
        for earlier in (folder / "wandb").glob("offline-run-*"):
            shutil.rmtree(earlier)

    if mode == "online":
        fault = _within(ANSWER, lambda: _fault(settings, key), f"{settings.base_url} doesn't answer")
        try:
            if not fault:
                experiment = start(mode)
                forget()
                log(f"W&B run {experiment.url}")
        except Exception as error:  # whatever it is: the run can be logged offline
            fault = f"{settings.base_url}: {_line(error)}"
            _within(ANSWER, _teardown, None)  # its process would still have this run's id in use
            _settings()
        if fault:
            log(f"W&B can't be used, so this run is logged offline until it is started again: {fault}")
            mode = "offline"
    if mode != "online":
        if mode == "offline":
            forget()
        try:
            experiment = start(mode)
        except (ValueError, wandb.errors.UsageError) as error:
            raise UserError(f"wandb refuses the settings of logger: {_line(error)}") from error
    experiment.config.update(dict(config or {}), allow_val_change=True)  # a resumed W&B run keeps the earlier values
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
            folder = Path(wandb.run.dir).parent
            try:
                wandb.finish()
            except Exception as error:
                log(f"W&B hasn't got all of this run ({_line(error)}): wandb sync --include-online {folder}")


def _settings() -> Any:
    """wandb's settings, from its files and the environment. It prints nothing from now on, and never asks for a key."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports wait 20 s at exit for a server that hangs
    import wandb

    with shielded():
        return wandb.setup(wandb.Settings(silent=True)).settings


def _key(settings: Any) -> str | None:
    """The key or the token's file that wandb would use: of the environment, the netrc file or its settings."""
    if found := os.environ.get("WANDB_API_KEY") or settings.identity_token_file:
        return str(found)
    try:
        from wandb.sdk.lib import wbauth
    except ImportError:  # older
        from wandb.sdk.lib import apikey  # type: ignore[attr-defined]

        return apikey.api_key(settings)
    return wbauth.read_netrc_auth(host=settings.base_url) or settings.api_key


def _fault(settings: Any, key: str | None) -> str | None:
    """Why W&B's server can't be used, where that is certain: wandb itself would retry for minutes."""
    proxies = {scheme: proxy for scheme in ("http", "https") if (proxy := getattr(settings, f"{scheme}_proxy", None))}
    headers = {"Content-Type": "application/json", "User-Agent": "wandb"}
    if key != settings.identity_token_file:
        headers["Authorization"] = "Basic " + b64encode(f"api:{key}".encode()).decode()
    query = Request(f"{settings.base_url}/graphql", json.dumps({"query": "{ viewer { id } }"}).encode(), headers)
    try:
        build_opener(ProxyHandler(proxies or None)).open(query, timeout=ANSWER).close()
    except HTTPError as error:
        if error.code == 401 and "Authorization" in headers:
            return f"{settings.base_url} refuses the key: run `wandb login --relogin`"
    except (OSError, HTTPException) as error:
        if not isinstance(getattr(error, "reason", None), SSLCertVerificationError):  # wandb may know the certificate
            return f"{settings.base_url} can't be reached: {_line(error)}"
    return None


def _teardown() -> None:
    import wandb

    with suppress(Exception, SystemExit):
        wandb.teardown()


def _within(seconds: float, call: Callable[[], str | None], otherwise: str | None) -> str | None:
    """What `call` returns, or `otherwise` if it takes longer: looking up a host's name has no timeout."""
    returned: list[str | None] = []
    thread = Thread(target=lambda: returned.append(call()), daemon=True)
    thread.start()
    thread.join(seconds)
    return returned[0] if returned else otherwise


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _identity(folder: Path, run: str) -> str:
    """The W&B run's id, kept in the run's folder. W&B never takes the id of a removed run again, and two people may
    give their runs one name."""
    file = folder / "wandb" / "id"
    if file.is_file():
        return file.read_text()
    identity = f"{run[:119]}-{secrets.token_hex(4)}"  # W&B takes 128 characters
    if file.parent.is_dir():  # by a run begun when the id was the name
        identity = run if len(run) <= 128 else f"{run[:119]}-{sha256(run.encode()).hexdigest()[:8]}"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, identity)
    return identity


def tensorboard_logger(
    *,
    run: str,
    folder: Path,
    group: str,
    history: Sequence[Mapping[str, str]],
    config: Mapping[str, Any] | None = None,
) -> TensorBoardLogger:
    """TensorBoard, in `FOLDER/tensorboard`; a resumed run hides the steps that it repeats."""
    again = int(history[-1]["step"]) + 1 if history else 0
    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", purge_step=again)
