"""The sweeper `hydra/sweeper=optuna`: asks Optuna for settings, and tells it what became of them.

hydra-optuna-sweeper isn't used: it needs Optuna 2, starts trials in batches that wait for their slowest, lets none know
its number, without which it can't be pruned, and goes on with no study that has unfinished trials.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Transformer
from hydra.utils import instantiate

from hydra_plugins.sft.grid import Ended, Grid, Job
from sft.errors import UserError


class Optuna(Grid):
    """Args: as in conf/hydra/sweeper/optuna.yaml."""

    def __init__(self, n_trials: int, n_jobs: int, study: str | None, storage: str, sampler: Any, pruner: Any) -> None:
        super().__init__()
        self.n_trials, self.n_jobs, self.study, self.storage = n_trials, n_jobs, study, storage
        self.sampler, self.pruner = sampler, pruner

    def sweep(self, arguments: list[str]) -> Any:
        import optuna
        from optuna.trial import TrialState

        from sft.training.pruning import journal

        overrides = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(arguments)
        space = {each.get_key_element(): distribution(each) for each in overrides if each.is_sweep_override()}
        fixed = [str(each.input_line) for each in overrides if not each.is_sweep_override()]
        if not space:
            raise UserError(
                "nothing varies: give an interval, as optimizer.lr=tag(log, interval(1e-5, 1e-3)), or A,B,C"
            )
        name = (
            self.study or f"{self.config.name}-{hashlib.sha256(json.dumps(sorted(arguments)).encode()).hexdigest()[:8]}"
        )
        Path(self.storage).parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(study_name=name, storage=journal(self.storage), load_if_exists=True)
        if self.sampler.get("seed") is not None:  # or a study that goes on would begin with its first trials again
            self.sampler.seed += len(study.trials)
        study.sampler = instantiate(self.sampler)

        def job(number: int, params: dict[str, Any]) -> Job:
            drawn = [f"{key}={value}" for key, value in params.items()]
            return self.job(number, [*fixed, *drawn, *self._pruning(name, number)], space)

        busy = set()

        def jobs() -> Iterator[Job]:
            for trial in study.get_trials(states=[TrialState.RUNNING]):  # what ran them was ended
                begun = job(trial.number, trial.params)
                self.refuse_queued(begun)
                busy.add(begun.run.folder)
                yield begun
            while len(study.trials) < self.n_trials:
                asked = study.ask(space)
                new = job(asked.number, asked.params)
                if new.run.folder in busy:  # drawn twice at once: two would train the same run
                    study.tell(asked, state=TrialState.FAIL)
                    continue
                busy.add(new.run.folder)
                yield new

        told = [trial for trial in study.trials if trial.state.is_finished()]
        print(f"study {name}: {len(told)} of {self.n_trials} trials have ended", flush=True)
        failed = {trial.number for trial in told if trial.state == TrialState.FAIL}
        ended = [Ended(job(each.number, each.params), None, "" if each.number in failed else None) for each in told]
        for each in self.run(jobs(), self.n_jobs):
            if each.failure is None and (each.value is None or math.isnan(each.value)):
                each = replace(each, failure="it has no validation loss")
            busy.discard(each.job.run.folder)
            self._tell_study(study, each)
            ended.append(each)
        pruned = {trial.number for trial in study.get_trials(states=[TrialState.PRUNED])}
        results = [(each.job.number in pruned, self.result(each)) for each in ended]
        self.finish([replace(result, state="pruned") if early else result for early, result in results])

    def _tell_study(self, study: Any, ended: Ended) -> None:
        from optuna.trial import TrialState

        trial = study.trials[ended.job.number]
        if ended.failure is not None:
            study.tell(trial.number, state=TrialState.FAIL)
        # Drawn once more, a setting is the run of the trial before it and ended as that did.
        elif any("pruned" in other.user_attrs for other in study.trials if other.params == trial.params):
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study.tell(trial.number, ended.value)

    def _pruning(self, study: str, trial: int) -> list[str]:
        """The callback by which a trial reports, as overrides."""
        callback = {"_target_": "sft.training.pruning.Pruning", "storage": self.storage, "study": study, "trial": trial}
        values = callback | {f"pruner.{key}": value for key, value in self.pruner.items()}
        return [f"++callbacks.pruning.{key}={json.dumps(value)}" for key, value in values.items()]


def distribution(override: Override) -> Any:
    """What Optuna draws a setting from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    interval = override.value()
    if not isinstance(interval, IntervalSweep):
        choices: Any = override.sweep_iterator(transformer=Transformer.encode)
        return CategoricalDistribution(list(choices))
    low, high, log = interval.start, interval.end, "log" in interval.tags
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)  # type: ignore[arg-type]
