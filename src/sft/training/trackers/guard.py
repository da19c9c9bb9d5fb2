"""No failure of a tracker ends a run: what a logger raises is one line in the log, and the run continues without it."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import Logger

from sft.training.log import log
from sft.training.trackers.waiting import line

METHODS = (
    *("log_metrics", "log_hyperparams", "log_graph", "after_save_checkpoint", "save", "finalize"),
    *("log_answers", "log_files", "alert", "close"),
)


def guarded(logger: Logger, name: str) -> Logger | None:
    """The same logger, whose methods raise nothing; None if it can't even begin. After a failure nothing more is asked
    of it, since each call might wait for a server that is gone."""
    lost = False

    def safe(call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def guarded_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal lost
            if lost:
                return None
            try:
                return call(*args, **kwargs)
            except Exception as error:
                lost = True
                log(f"{name} failed; the run continues without it until it is resumed: {line(error)}")
                return None

        return guarded_call

    try:
        _ = getattr(logger, "experiment", None)  # Lightning asks for it at the start
    except Exception as error:
        log(f"{name} can't be used; the run continues without it until it is resumed: {line(error)}")
        return None
    for method in METHODS:
        if hasattr(logger, method):
            setattr(logger, method, safe(getattr(logger, method)))
    return logger
