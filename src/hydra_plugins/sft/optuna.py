"""The sweeper `hydra/sweeper=optuna`: asks Optuna for settings, and reports their results to it.

It replaces hydra-optuna-sweeper, which needs Optuna 2, starts trials in batches that wait for their slowest, tells no
trial its number, without which it can't be pruned, and resumes no study that has unfinished trials.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from omegaconf import DictConfig

from hydra_plugins.sft.grid import Ended, Grid, Setting
from sft.config.literal import instantiate
from sft.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution


@dataclass(eq=False)
class Optuna(Grid):
    """Args: as in conf/hydra/sweeper/optuna.yaml."""

    n_trials: int
    n_jobs: int
    study: str | None
    storage: str
    sampler: DictConfig
    pruner: Mapping[str, object]

    def __post_init__(self) -> None:
        super().__init__()

    def sweep(self, arguments: list[str]) -> None:
        from optuna.trial import TrialState

        overrides = self.parse(arguments)
        space = {item.get_key_element(): distribution(item) for item in overrides if item.is_sweep_override()}
        fixed = [str(item.input_line) for item in overrides if not item.is_sweep_override()]
        if not space:
            raise UserError(
                "nothing varies: give an interval, as optimizer.lr=tag(log, interval(1e-5, 1e-3)), or A,B,C"
            )
        digest = hashlib.sha256(json.dumps(sorted(arguments)).encode()).hexdigest()[:8]
        study = self._open_study(self.study or f"{self.config.name}-{digest}")

        def setting(number: int, params: dict[str, object]) -> Setting:
            drawn = [f"{key}={value}" for key, value in params.items()]
            return self.setting(number, [*fixed, *drawn, *self._pruning(study.study_name, number)], space)

        training = set()

        def settings() -> Iterator[Setting]:
            for begun in study.get_trials(states=[TrialState.RUNNING]):  # by a command that was ended
                unfinished = setting(begun.number, begun.params)
                self.refuse_queued(unfinished)
                training.add(unfinished.run.folder)
                yield unfinished
            while len(study.trials) < self.n_trials:
                trial = study.ask(space)
                new = setting(trial.number, trial.params)
                if new.run.folder in training:  # drawn twice at once: two jobs would train the same run
                    study.tell(trial, state=TrialState.FAIL)
                    continue
                training.add(new.run.folder)
                yield new

        finished = [trial for trial in study.trials if trial.state.is_finished()]
        print(f"study {study.study_name}: {len(finished)} of {self.n_trials} trials have ended", flush=True)
        all_ended = []
        for trial in finished:
            failure = "" if trial.state == TrialState.FAIL else None
            all_ended.append(Ended(setting(trial.number, trial.params), None, failure))
        for ended in self.train(settings(), self.n_jobs):
            if ended.failure is None and (ended.loss is None or math.isnan(ended.loss)):
                ended = replace(ended, failure="it has no validation loss")
            training.discard(ended.setting.run.folder)
            report(study, ended)
            all_ended.append(ended)
        pruned = {trial.number for trial in study.get_trials(states=[TrialState.PRUNED])}
        results = []
        for ended in all_ended:
            result = self.result(ended)
            results.append(replace(result, state="pruned") if ended.setting.number in pruned else result)
        self.finish(results)

    def _open_study(self, name: str) -> "Study":
        """The study of this name in `storage`, new or resumed."""
        import optuna

        from sft.training.pruning import journal

        Path(self.storage).parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(study_name=name, storage=journal(self.storage), load_if_exists=True)
        if self.sampler.get("seed") is not None:  # otherwise a resumed study would draw its first trials again
            self.sampler.seed += len(study.trials)
        study.sampler = instantiate(self.sampler)
        return study

    def _pruning(self, study: str, trial: int) -> list[str]:
        """The callback through which a trial reports, as overrides."""
        callback = {"_target_": "sft.training.pruning.Pruning", "storage": self.storage, "study": study, "trial": trial}
        values = callback | {f"pruner.{key}": value for key, value in self.pruner.items()}
        return [f"++callbacks.pruning.{key}={json.dumps(value)}" for key, value in values.items()]


def report(study: "Study", ended: Ended) -> None:
    """Reports a trial's result to the study."""
    from optuna.trial import TrialState

    trial = study.trials[ended.setting.number]
    if ended.failure is not None:
        study.tell(trial.number, state=TrialState.FAIL)
    # The same setting drawn again is the run of the earlier trial, and ended in the same way.
    elif any("pruned" in other.user_attrs for other in study.trials if other.params == trial.params):
        study.tell(trial.number, state=TrialState.PRUNED)
    else:
        study.tell(trial.number, ended.loss)


def distribution(override: Override) -> "BaseDistribution":
    """The distribution from which Optuna draws a setting."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    interval = override.value()
    if not isinstance(interval, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_iterator(Transformer.encode)))  # type: ignore[arg-type]
    low, high, log = interval.start, interval.end, "log" in interval.tags
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)  # type: ignore[arg-type]
