"""Checks a configuration against the schema, in this one place, before anything is loaded."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from sft.config.schema import CALLBACKS, COMMANDS, OPTIONS, OURS, Settings, Train
from sft.errors import UnknownSetting, UserError


class Fault(NamedTuple):
    """A setting that isn't as it should be: unknown if `expected` is None."""

    name: str
    value: object
    expected: str | None


def check(config: Mapping[str, Any], command: str = "train", typed: Collection[str] = ()) -> list[str]:
    """The settings that are left over: of another option of a group than the one that was chosen, and not among those
    that were typed. They are to be dropped. `UserError` for the first setting that is unknown, missing or out of its
    range.

    Args:
        config: a command's resolved configuration.
        typed: names that were given on the command line.
    """
    left_over = []
    for fault in faults(config, command):
        if fault.expected is not None:
            raise UserError(f"{fault.name}={shown(fault.value)} is not {fault.expected}")
        group, _, name = fault.name.rpartition(".")
        others = OPTIONS.get(group, {}).values()
        if fault.name in typed or not any(name in option.model_fields for option in others):
            raise UnknownSetting(fault.name, command)
        left_over.append(fault.name)
    return left_over


def faults(config: Mapping[str, Any], command: str) -> Iterator[Fault]:
    """All faults of a command's resolved configuration."""
    model = COMMANDS.get(command, Train)
    yield from _faults(config, model, "")
    if not issubclass(model, Train):
        return
    for group in OPTIONS:
        node: Any = config
        for part in group.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        if group == "logger" and isinstance(node, Mapping) and "_target_" not in node:
            yield from _faults_of_loggers(node)
        elif isinstance(node, Mapping) and (option := option_of(group, node)):
            yield from _faults(node, option, f"{group}.")
    for name, callback in (config.get("callbacks") or {}).items():
        target = callback.get("_target_") if isinstance(callback, Mapping) else None
        if not isinstance(target, str):
            yield Fault(f"callbacks.{name}", callback, "a callback: a mapping with its class as _target_")
        elif target.startswith(OURS) and (option := CALLBACKS.get(target.rpartition(".")[2])):
            yield from _faults(callback, option, f"callbacks.{name}.")


def option_of(group: str, node: Mapping[str, Any]) -> type[Settings] | None:
    """The class of a group's option; None for one of the user's own."""
    target = str(node.get("_target_", ""))
    return OPTIONS[group].get(target.rpartition(".")[2]) if not target or target.startswith(OURS) else None


def _faults_of_loggers(node: Mapping[str, Any]) -> Iterator[Fault]:
    """Several loggers, and the settings of all of them. A logger of the user's own may have any beside it."""
    loggers = {name: each for name, each in node.items() if isinstance(each, Mapping) and "_target_" in each}
    beside = {name: value for name, value in node.items() if name not in loggers}
    options = {name: option_of("logger", each) for name, each in loggers.items()}
    for name, option in options.items():
        if option is not None:
            yield from _faults(loggers[name], OPTIONS["logger"][""], f"logger.{name}.")
    known = [option for option in options.values() if option is not None]
    for option in known or [OPTIONS["logger"][""]]:
        for fault in _faults(beside, option, "logger."):
            others = any(fault.name.removeprefix("logger.") in other.model_fields for other in known)
            if fault.expected is not None or not (others or None in options.values()):
                yield fault


def targets(node: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The name and the value of each `_target_`."""
    for key, value in node.items() if isinstance(node, Mapping) else ():
        place = f"{name}.{key}".lstrip(".")
        if key == "_target_":
            yield place, str(value)
        yield from targets(value, place)


def _faults(node: Mapping[str, Any], model: type[BaseModel], prefix: str) -> Iterator[Fault]:
    try:
        model.model_validate({name: value for name, value in node.items() if name not in ("_target_", "_partial_")})
    except ValidationError as errors:
        seen = set()
        for error in errors.errors():
            name, value, expected = _place(error["loc"], node, model)
            if name not in seen:
                is_unknown = error["type"] == "extra_forbidden"
                yield Fault(prefix + name, value, None if is_unknown else expected)
            seen.add(name)


def _place(location: tuple[int | str, ...], node: Any, model: type[BaseModel]) -> tuple[str, object, str]:
    """The name, the value and the description of the setting at a location, which goes on into lists and unions."""
    names: list[str] = []
    for part in location:
        field = model.model_fields.get(str(part))
        node = node.get(part) if isinstance(node, Mapping) else None
        names.append(str(part))
        inner = nested(field.annotation) if field else None
        if field is None or inner is None or not isinstance(node, Mapping):
            break
        model = inner
    return ".".join(names), node, description(field.annotation, field.description) if field else "known"


def nested(annotation: Any) -> type[BaseModel] | None:
    """The class of a setting that has settings of its own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(nested, get_args(annotation))), None)


def description(annotation: Any, words: str | None = None) -> str:
    """What a setting must be, in words, as a sentence goes on with it."""
    parts = get_args(annotation)
    if words is None:
        described = [getattr(item, "description", None) for item in reversed(getattr(annotation, "__metadata__", ()))]
        described += [description(part) for part in parts if part is not type(None)]
        words = next(filter(None, described), "a mapping of settings" if nested(annotation) else "")
    return f"{words} (or null)" if words and type(None) in parts and "null" not in words else words


def shown(value: object) -> str:
    """A value as it is typed."""
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
