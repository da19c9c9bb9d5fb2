"""What ends a run before its last step: which callback, and why. Refuses early stopping that can't work."""

import re
from collections.abc import Iterable

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping

from sft.errors import UserError
from sft.training import averaging
from sft.training.callbacks import bases
from sft.training.callbacks import check as check_classes
from sft.training.settings import NEVER_STOPS


def check(callbacks: Iterable[Callback], has_validation: bool) -> None:
    """Refuses callbacks that can't work here, and early stopping without validation data, where nothing would ever be
    compared."""
    check_classes(bases(callbacks))
    if not has_validation and any(isinstance(callback, EarlyStopping) for callback in callbacks):
        raise UserError(NEVER_STOPS)


class MonitoredMetrics(Callback):
    """Refuses early stopping on a metric that is not measured. It must come before the others: Lightning's own callback
    raises an error of another kind, and only at a validation after training steps."""

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking and (_users(trainer) or averaging.of(trainer)):
            return  # they may measure it in training
        for stopping in trainer.early_stopping_callbacks:
            assert isinstance(stopping, EarlyStopping)
            measured = trainer.callback_metrics
            if stopping.strict and not stopping._check_on_train_epoch_end and stopping.monitor not in measured:
                losses = [name for name in measured if re.match(r"val/loss(_average)?(/|$)", name)]
                raise UserError(
                    f"EarlyStopping monitors {stopping.monitor}, which is not measured: set its monitor to "
                    f"{', '.join(losses)} or another metric of docs/metrics.md"
                )


def why(trainer: L.Trainer) -> tuple[str | None, str]:
    """The class of the callback that has ended the run, if it is known, and which it is and why, as far as it says so
    in its `stopping_reason_message`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if reason := getattr(callback, "stopping_reason_message", None):
            name = "early stopping" if isinstance(callback, EarlyStopping) else type(callback).__name__
            reason = reason.removeprefix("Monitored metric ").removesuffix(" Signaling Trainer to stop.").rstrip(".")
            reason = reason.replace("last 1 records", "validation").replace(" records", " validations")
            return type(callback).__name__, f"{name}: {reason}"
    users = _users(trainer)
    return (users[0], f"{users[0]} stopped it") if len(users) == 1 else (None, "a callback stopped it")


def _users(trainer: L.Trainer) -> list[str]:
    """The classes of callbacks that are neither Lightning's nor ours."""
    classes = {type(callback) for callback in trainer.callbacks}  # type: ignore[attr-defined]
    return [each.__name__ for each in classes if each.__module__.partition(".")[0] not in ("lightning", "sft")]
