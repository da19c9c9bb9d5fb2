"""The callback that reports a sweep's trial to Optuna at each validation, and ends a bad one early."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning as L
from lightning.pytorch.callbacks import Callback

from sft.training.module import SFTModule

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import JournalStorage


def journal(path: str) -> "JournalStorage":
    """A study's file. Its lock is a symbolic link, which shared file systems make atomically, too."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(path))


@dataclass(eq=False)
class Pruning(Callback):
    """Reports a trial of a sweep, and ends it if the pruner says so."""

    storage: str
    study: str
    trial: int
    pruner: "BasePruner"
    stopping_reason_message: str | None = None  # why it has ended the trial

    def on_validation_end(self, trainer: L.Trainer, module: SFTModule) -> None:
        if trainer.sanity_checking or trainer.global_step == module.num_steps:  # there is nothing to end
            return
        bad = trainer.is_global_zero and self._is_bad(trainer.global_step, module.val_loss)
        if trainer.strategy.reduce_boolean_decision(bad, all=False):
            bad_loss = math.isnan(module.val_loss)
            self.stopping_reason_message = "the validation loss is NaN" if bad_loss else "other trials do better"
            trainer.should_stop = True  # the step is saved as the run's last

    def _is_bad(self, step: int, loss: float) -> bool:
        import optuna

        storage = journal(self.storage)
        study = optuna.load_study(study_name=self.study, storage=storage)
        trial = storage.get_trial_id_from_study_id_trial_number(storage.get_study_id_from_name(self.study), self.trial)
        if step not in storage.get_trial(trial).intermediate_values:  # a resumed run makes a step twice
            storage.set_trial_intermediate_value(trial, step, loss)
        bad = math.isnan(loss) or bool(self.pruner.prune(study, storage.get_trial(trial)))
        if bad:
            storage.set_trial_user_attr(trial, "pruned", step)
        return bad
