"""Which settings make a run what it is: two runs are the same if all that decides their numbers is."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]  # type: ignore[explicit-any]  # a resolved configuration: nested, of whatever YAML can say

# The settings that decide the numbers of a run. Not among them: where it runs, how it is shared out (rule 2) and what
# is logged.
DECIDING = (
    "seed",
    "epochs",
    "max_steps",
    "global_batch_size",
    "model",
    "adapter",
    "data",
    "optimizer",
    "schedule",
    "trainer.precision",
    "trainer.gradient_clip_val",
    "trainer.gradient_clip_algorithm",
    "parameters",
    "loss",
    "extend",
    "averaging",  # it doesn't change the weights, but a run that resumes with another average would mix two
    # What DeepSpeed rounds beyond what the precision says.
    "strategy.config.data_types.grad_accum_dtype",
    "strategy.config.communication_data_type",
    "strategy.config.zero_optimization.zero_quantized_weights",
    "strategy.config.zero_optimization.zero_quantized_nontrainable_weights",
    "strategy.config.zero_optimization.zero_quantized_gradients",
)
NOT_DECIDING = (
    "model.attention",
    "model.isolate",
    "model.gradient_checkpointing",
    "model.activation_offload",
    "model.compile",
    "adapter.merge",
    "averaging.export",
    "averaging.export",
    "data.num_workers",
    "data.cache_dir",
    "data.max_lost",
)
TODAY = "today"  # the one name in `model.template` that is ours: the day that the template sees, YYYY-MM-DD
# Settings that came later and that runs begun before lack: each decides nothing at the value that means what there was
# without it.
NEUTRAL: dict[str, object] = {
    "model.template": {},
    "model.template.today": None,
    "model.new_weights": None,
    "model.add_tokens": None,
    "adapter.use_dora": False,
    "adapter.init": "default",
    "adapter.modules_to_save": None,
    "adapter.trainable_tokens": None,
    "data.train_on": "all",
    "data.train_reasoning": True,
    "data.train_tool_calls": True,
    "data.special_text": None,
    "data.sample_by": "line",
    "data.conversation.system_column": None,
    "trainer.gradient_clip_algorithm": "norm",
    "model.neftune_alpha": 0.0,
    "loss": {},
    "loss.label_smoothing": 0.0,
    "loss.z_loss": 0.0,
    "loss.router_aux": 0.0,
    "parameters": {},
    "parameters.train": None,
    "parameters.freeze": None,
    "parameters.groups": None,
    "averaging": {},
    "extend.run": None,
    "extend.schedule": "continue",
    "extend.step": None,
    "strategy.config.data_types.grad_accum_dtype": "fp32",
    "strategy.config.communication_data_type": None,
    "strategy.config.zero_optimization.zero_quantized_weights": False,
    "strategy.config.zero_optimization.zero_quantized_nontrainable_weights": False,
    "strategy.config.zero_optimization.zero_quantized_gradients": False,
}
# The module of the project's own classes and functions decides nothing: each counts by the name that it had when the
# first hash was made of it.
TARGETS = {
    "sft.model.loading": ("ModelSource",),
    "sft.model.adapter": ("Adapter",),
    "sft.data.dataset": ("DataConfig",),
    "sft.data.conversation": ("prompt_response", "messages", "text", "alpaca", "conversational"),
    "sft.data.token_ids": ("pretokenized",),
    "sft.training.averaging": ("ema", "swa"),
    "sft.model.optimizer": ("constant", "linear", "cosine", "warmup_stable_decay"),
}


# data=auto, while no row has been read, counts as what was the default before it.
UNREAD = "sft.data.shape.auto"
UNREAD_MEANS = {
    "_target_": "sft.data.conversation.prompt_response",
    **{"prompt": "prompt", "response": "response", "system": None, "chat": True},
}


def deciding(config: Config) -> dict[str, object]:
    """The settings of a resolved configuration that decide the numbers, by dotted name."""
    data = config.get("data") or {}
    if (conversation := data.get("conversation") or {}).get("_target_") == UNREAD:
        asked = {key: value for key, value in conversation.items() if key != "_target_" and value is not None}
        config = {**config, "data": {**data, "conversation": {**UNREAD_MEANS, **asked}}}
    if isinstance(epochs := config.get("epochs"), float) and epochs.is_integer():
        config = {**config, "epochs": int(epochs)}  # however it is written
    trainer = config.get("trainer") or {}
    if not trainer.get("gradient_clip_val", 1):  # 0 means null, and what isn't clipped is clipped in no way
        config = {**config, "trainer": {**trainer, "gradient_clip_val": None, "gradient_clip_algorithm": "norm"}}
    return {
        name: _first_name(str(value)) if name.endswith("._target_") else value
        for name, value in sorted(flatten(config).items())
        if _within(name, DECIDING)
        and not _within(name, NOT_DECIDING)
        and not (name in NEUTRAL and value == NEUTRAL[name])
    }


def _first_name(target: str) -> str:
    """The name by which a `_target_` counts: a user's own, outside of this package, by its own."""
    package, _, name = target.rpartition(".")
    modules = [module for module, names in TARGETS.items() if name in names and package.startswith("sft.")]
    return f"{modules[0]}.{name}" if modules else target


def identity(config: Config) -> str:
    """A hash of all that decides the numbers, in eight hexadecimal digits."""
    return hashlib.sha256(json.dumps(deciding(config), sort_keys=True).encode()).hexdigest()[:8]


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted name."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value}
    flat: dict[str, object] = {}
    for key, inner in value.items():
        flat |= flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _within(name: str, groups: tuple[str, ...]) -> bool:
    return any(name == group or name.startswith(group + ".") for group in groups)
