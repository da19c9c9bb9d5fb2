"""How long a run is, said before its first step: steps, epochs, and what a step sees. Refuses a schedule that doesn't
fit."""

from omegaconf import DictConfig

from sft.config.schema import OURS
from sft.errors import UserError
from sft.model.optimizer import steps_of
from sft.training.datamodule import SFTDataModule

FEW_STEPS = 30  # below, a usual learning rate hardly moves a model


def check_schedule(schedule: DictConfig, num_steps: int) -> None:
    """`UserError` for phases of one of our schedules that take longer than the run."""
    phases = {name: schedule[name] for name in ("warmup", "decay") if name in schedule}
    if not schedule._target_.startswith(OURS):
        return
    warmup, decay = (steps_of(phases.get(name, 0), num_steps) for name in ("warmup", "decay"))
    if warmup < num_steps and warmup + decay <= num_steps:
        return
    asked = " and ".join(f"schedule.{name}={value:g}" for name, value in phases.items())
    raise UserError(
        f"{asked} take{'s' * (len(phases) == 1)} the run's {num_steps} steps or more, so the learning rate would "
        "never be optimizer.lr: set it lower, or to a share of the run like 0.03"
    )


def lines(config: DictConfig, data: SFTDataModule) -> list[str]:
    """What the run's steps are, and a note where they are few."""
    num, per_epoch, train = data.num_steps, data.steps_per_epoch, data.train
    samples, tokens, supervised = (
        total / per_epoch for total in (len(train), int(train.lengths.sum()), int(train.num_supervised.sum()))
    )
    decides = f" (max_steps decides, not epochs={config.epochs:g})" if config.max_steps else ""
    about = (
        f"steps: {num}, or {num / per_epoch:.3g} epochs of {per_epoch}{decides}; each sees about {samples:,.3g} "
        f"samples, {tokens:,.0f} tokens, {supervised:,.0f} of them with loss"
    )
    said = [about]
    if data.global_batch_size > data.num_packs:
        said.append(
            f"global_batch_size={data.global_batch_size} is more than the {data.num_packs} packs of an epoch: each "
            "step trains on all of them"
        )
    if num >= FEW_STEPS:
        return said
    ways = ["max_steps=100" if config.max_steps else f"epochs={-(-100 // per_epoch)}", "a higher optimizer.lr"]
    if data.global_batch_size > 1 and not config.max_steps:  # whose number a smaller batch doesn't raise
        ways.insert(1, f"global_batch_size={max(1, min(data.global_batch_size, data.num_packs) // 4)}")
    return [*said, f"note: {num} steps teach a model little: set {', '.join(ways[:-1])} or {ways[-1]}"]
