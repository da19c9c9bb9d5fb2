"""Callbacks of Lightning's that can't work here, with what to set instead; and what callbacks keep in a checkpoint."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sft.errors import UserError

if TYPE_CHECKING:  # it takes seconds, and what a configuration names is refused before
    import lightning as L
    from lightning.pytorch.callbacks import Callback

AVERAGING = (
    "validates an average, while the weights themselves are saved: set averaging=ema or averaging=swa, which is saved, "
    "restored and exported"
)
FILES = "writes files that nothing here reads: set checkpoint.save_every, checkpoint.keep_last or checkpoint.export"
EPOCHS = "acts at Lightning's epochs, of which a run has one: set parameters.train or parameters.freeze"
REFUSED = {
    "WeightAveraging": AVERAGING,
    "EMAWeightAveraging": AVERAGING,
    "StochasticWeightAveraging": AVERAGING,
    "Checkpoint": FILES,
    "ModelCheckpoint": FILES,
    "OnExceptionCheckpoint": FILES,
    "BaseFinetuning": EPOCHS,
    "BackboneFinetuning": EPOCHS,
    "LearningRateFinder": "takes the run's own steps for its trials: search with sft train -m optimizer.lr=1e-5,3e-5",
    "BatchSizeFinder": "changes the number of samples of a step: set micro_batch_size, which doesn't",
    "GradientAccumulationScheduler": "changes the number of samples of a step: set global_batch_size",
    "ModelPruning": "renames the weights, which checkpoints and exports know by name",
    "SpikeDetection": "wants batches left out, and the step plan has none to leave out: set trainer.gradient_clip_val",
}
HOOKS = "|on_save_checkpoint"  # after a callback's key: what that hook of it put into a checkpoint


def check(classes: Iterable[tuple[str, str]]) -> None:
    """Refuses callbacks by their modules and names, or those of a class that they are derived from."""
    for module, name in classes:
        if module.partition(".")[0] in ("lightning", "pytorch_lightning") and name in REFUSED:
            raise UserError(f"callbacks: {name} {REFUSED[name]}")


def bases(callbacks: "Iterable[Callback]") -> list[tuple[str, str]]:
    """Module and name of each callback's class and the classes that it is derived from."""
    return [(base.__module__, base.__name__) for callback in callbacks for base in type(callback).__mro__]


def states(callbacks: "Iterable[Callback]", trainer: "L.Trainer", module: "L.LightningModule") -> dict[str, object]:
    """The state of each callback, by its key: what it calls so, and what it puts into Lightning's checkpoints."""
    found: dict[str, object] = {}
    for callback in callbacks:
        found[callback.state_key] = callback.state_dict()
        if _overrides(callback, "on_save_checkpoint"):
            added: dict[str, object] = {}
            callback.on_save_checkpoint(trainer, module, added)
            found[callback.state_key + HOOKS] = added
    return {key: state for key, state in found.items() if state}


def load(trainer: "L.Trainer", module: "L.LightningModule", saved: dict[str, dict[str, object]]) -> None:
    """Gives callbacks back what they have kept."""
    from lightning.pytorch.callbacks import EarlyStopping, Timer

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _overrides(callback, "on_load_checkpoint") and (added := saved.get(callback.state_key + HOOKS)):
            callback.on_load_checkpoint(trainer, module, added)
        state = saved.get(callback.state_key)
        if state is None or isinstance(callback, Timer):  # the time of a process is its own
            continue
        if isinstance(callback, EarlyStopping):  # the patience may be another, and it has not ended this run yet
            state = {**state, "patience": callback.patience, "stopping_reason_message": None}
        callback.load_state_dict(state)


def check_states(trainer: "L.Trainer", module: "L.LightningModule") -> None:
    """Refuses callbacks whose state no checkpoint can hold, before a step is lost."""
    from sft.checkpoint import plain_state

    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        try:
            plain_state.parse(plain_state.dump(states([callback], trainer, module)))
        except Exception as error:  # of the user's own code, or of what it keeps
            message = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"the state of {type(callback).__name__} can't be saved and read again ({message}): keep plain values "
                "and tensors in state_dict(); on_save_checkpoint gets a dictionary without weights to add to"
            ) from error


def _overrides(callback: "Callback", hook: str) -> bool:
    """Whether a callback has a hook of its own, not Lightning's empty one."""
    return not getattr(type(callback), hook).__module__.startswith("lightning.pytorch.callbacks.callback")
