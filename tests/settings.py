"""A model's and an adapter's settings as conf/ has them, with changes."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.config import CONF
from sft.model.adapter import Adapter
from sft.model.loading import ModelSource


def model_source(**changes: object) -> ModelSource:
    return ModelSource(**_settings(CONF / "model" / "pretrained.yaml") | changes)


def adapter(**changes: object) -> Adapter:
    return Adapter(**_settings(CONF / "adapter" / "lora.yaml") | changes)


def _settings(path: Path) -> dict[str, Any]:
    settings: Any = OmegaConf.to_container(OmegaConf.load(path))
    del settings["_target_"]
    return settings
