"""Text that holds ${...} and means only itself. OmegaConf takes such a text for a reference, to another setting or to
the environment, in whatever configuration it finds it, and takes an escape off each time that it resolves one. So what
is resolved already, or comes from data, is escaped where a configuration gets it."""

import re
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate as hydra_instantiate
from omegaconf import DictConfig, OmegaConf

REFERENCE = re.compile(r"(\\*)\$\{")


def escaped(value: Any) -> Any:
    """A value, nested or not, whose texts OmegaConf resolves to what they are."""
    if isinstance(value, Mapping):
        return {key: escaped(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(inner) for inner in value]
    return REFERENCE.sub(r"\1\1\\${", value) if isinstance(value, str) else value


def literal(settings: Mapping[str, Any]) -> DictConfig:
    """A configuration of settings that are resolved."""
    return OmegaConf.create(escaped(settings))


def resolved(config: DictConfig) -> DictConfig:
    """The configuration without references: each setting keeps its value when those that it referred to change."""
    settings: Any = OmegaConf.to_container(config, resolve=True)
    return literal(settings)


def instantiate(node: Any, **options: Any) -> Any:
    """Hydra's, which resolves what it has resolved once more. `node`: of a configuration, or settings that are resolved
    already."""
    settings = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not _has_reference(settings):
        return hydra_instantiate(node, **options)
    made = OmegaConf.create(_made(settings))
    if OmegaConf.is_config(node):
        made._set_parent(node._get_parent())  # errors name the place
        made._set_key(node._key())
    return hydra_instantiate(made, **{"_convert_": "all", **options})


def joined(*parts: str) -> str:
    return "".join(parts)


def _has_reference(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_has_reference, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_reference, value))
    return isinstance(value, str) and "${" in value


def _made(value: Any) -> Any:
    """With a call that makes it in the place of each text that OmegaConf would resolve."""
    if isinstance(value, Mapping):
        return {key: escaped(inner) if key == "_target_" else _made(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_made(inner) for inner in value]
    if not _has_reference(value):
        return value
    return {"_target_": f"{__name__}.joined", "_args_": re.split(r"(?<=\$)(?=\{)", value)}
