"""Whether a run that a callback has ended before its last step continues: with that callback left out, or set
otherwise, it does. Callbacks are not in a run's name, so it is the same run."""

from collections.abc import Mapping
from typing import Any

from sft.config.check import shown
from sft.runs import saved
from sft.runs.identity import flatten
from sft.runs.run import Run
from sft.runs.secrets import without_secrets

Callbacks = Mapping[str, Mapping[str, Any]]  # type: ignore[explicit-any]  # settings by name


def lifted(run: Run, callbacks: Callbacks) -> str | None:
    """What is different in these callbacks, so that a run that ended early continues from its last checkpoint; None
    where it has not ended early, or stays ended."""
    newest, _ = saved.whole(run.checkpoints)
    if newest is None:
        return None
    state: dict[str, Any] = saved.state(newest)  # type: ignore[explicit-any]
    if not state["stopped"] or state["step"] >= state["num_steps"]:
        return None
    if state.get("optimizer_dropped"):
        return None
    by = state.get("stopped_by")
    if by is None and str(state.get("stopped_early")).startswith("early stopping: "):  # before the class was kept
        by = "EarlyStopping"
    recorded = state.get("callbacks", run.config.get("callbacks")) or {}
    recorded, callbacks = without_secrets(recorded), without_secrets(callbacks)  # as they are recorded
    for name, before in recorded.items():
        target = str(before["_target_"])
        if target.rpartition(".")[2] != by:
            continue
        if (after := callbacks.get(name)) is None:
            return f"without callbacks.{name}"
        old, new = flatten(before), flatten(after)
        changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
        less = changed == ["patience"] and float(str(new["patience"])) < float(str(old["patience"]))
        if changed and not less and not target.startswith("sft."):  # a sweep's pruning has another trial each time
            key = changed[0]
            return f"with callbacks.{name}.{key}={shown(new.get(key))}, not {shown(old.get(key))}"
    return None
