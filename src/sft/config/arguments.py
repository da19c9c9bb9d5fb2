"""What a person types → Hydra's arguments: put into Hydra's grammar where that has no form for it, or answered in a
line."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NamedTuple, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel

from sft.config import CONF, schema
from sft.config.check import nested
from sft.config.known_as import known_as
from sft.errors import UserError

# Hydra's own options: with a value, and without.
WITH_VALUE = {
    "--cfg": "--cfg",
    "-c": "--cfg",
    "--package": "--package",
    "-p": "--package",
    "--config-name": "--config-name",
    "-cn": "--config-name",
    "--config-dir": "--config-dir",
    "-cd": "--config-dir",
    "--info": "--info",
    "-i": "--info",
}
ALONE = {"--multirun": "--multirun", "-m": "--multirun", "--resolve": "--resolve"}
SEVERAL = {"compare": "runs", "runs": "run", "watch": "run"}  # takes bare words as a list in this setting
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.gz|\.zst)?$")
SETTING = re.compile(r"(?P<prefix>\+\+|\+|)(?P<name>[\w.@:/$-]+)=(?P<value>.*)", re.S)


class Typed(NamedTuple):
    """A command line in Hydra's grammar."""

    options: list[str]  # Hydra's own
    settings: list[str]  # overrides

    @property
    def config_dir(self) -> Path | None:
        """A folder of configuration of the user's own."""
        pairs = zip(self.options, self.options[1:], strict=False)
        return next((Path(value).expanduser() for option, value in pairs if option == "--config-dir"), None)

    @property
    def names(self) -> set[str]:
        """Of the settings."""
        return {match["name"] for setting in self.settings if (match := SETTING.match(setting))}

    def all(self) -> list[str]:
        return [*self.options, *self.settings]


def parse(command: str, arguments: Sequence[str]) -> Typed:
    """The arguments of a command, Hydra's options before the settings; `UserError` for what can't be meant."""
    options: list[str] = []
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        option, is_joined, joined = word.partition("=")
        if command == "generate" and option in ("--prompt", "-p"):
            if any(word.startswith("prompt=") for word in words):
                raise UserError("there are two prompts: put them into a file, one a line, and set file=FILE")
            if not is_joined and not rest:
                raise UserError('--prompt needs a text: sft generate run=NAME --prompt "..."')
            words.append(f"prompt={_quoted(joined if is_joined else rest.pop(0))}")
        elif option in WITH_VALUE:
            if not is_joined and not rest:
                raise UserError(f"{option} needs a value")
            options += [WITH_VALUE[option], joined if is_joined else rest.pop(0)]
        elif word in ALONE:
            options.append(ALONE[word])
        elif word.startswith("-"):
            _refuse_option(command, word, rest)
        else:
            words.append(word)
    is_sweep = "--multirun" in options
    if is_sweep and "--cfg" in options:
        raise UserError(
            "-m and --cfg: each setting of a sweep has a configuration of its own: leave out -m, and give "
            "one value to each setting"
        )
    typed = Typed(options, [])
    if setting := SEVERAL.get(command):
        folders = [word for word in words if not _is_setting(word)]
        words = [word for word in words if _is_setting(word)]
        if folders:
            words.append(f"{setting}=[{','.join(map(_quoted, folders))}]")
    for word in words:
        if word.startswith("~"):
            typed.settings.append(word)
        elif match := SETTING.fullmatch(word):
            typed.settings.append(_setting(command, match, word, typed.config_dir, is_sweep))
        elif command in ("score", "generate", "export") and not any(s.startswith("run=") for s in typed.settings):
            typed.settings.append(f"run={_quoted(word)}")
        else:
            raise UserError(f"{word}: {_advice_on_word(command, word)}")
    return typed


def groups(config_dir: Path | None = None) -> dict[str, list[str]]:
    """The options of each configuration group, those of the user's own folder too."""
    found: dict[str, set[str]] = {}
    for folder in (CONF, config_dir):
        for path in folder.glob("*/*.yaml") if folder else ():
            if path.stem != "base" and path.parent.name not in ("hydra", "local"):
                found.setdefault(path.parent.name, set()).add(path.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def _setting(command: str, match: re.Match[str], word: str, config_dir: Path | None, is_sweep: bool) -> str:
    """One setting in Hydra's grammar."""
    prefix, name, value = match["prefix"], match["name"], match["value"]
    if command == "score" and name == "data":
        name = "path"
    options = groups(config_dir).get(name)
    if options is not None and issubclass(schema.COMMANDS.get(command, schema.Train), schema.Train):
        return _choice(prefix, name, value, options, is_sweep)
    kind = _kind(command, name)
    if prefix or (kind is None and _is_open(command, name)):
        prefix = "++"  # whether it is there already or not
    if kind == "text" and value.startswith("~"):
        try:
            value = str(Path(value).expanduser())
        except RuntimeError as error:
            raise UserError(f"{word}: there is no user {value[1:].partition('/')[0]}") from error
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed: Any = OverridesParser.create().parse_override(f"{prefix}{name}={value}")
        meant = parsed.value()
        is_several = parsed.is_sweep_override() and not is_sweep
    except HydraException:
        if kind != "text":
            raise UserError(
                f"{word} can't be read: a number is written like 1e-4, a list like [a,b], and a text with other signs "
                f"in it in two pairs of quotes, '{name}=\"{value}\"'"
            ) from None
        return f"{prefix}{name}={_quoted(value)}"
    if is_several and kind != "text":
        raise UserError(
            f"{word} has several values: add -m to train with each of them, or write a list as {name}=[{value}]"
        )
    # A text means itself, also where it looks like a number.
    literal = kind == "text" and (is_several or (isinstance(meant, bool | int | float) and not isinstance(meant, str)))
    return f"{prefix}{name}={_quoted(value) if literal else value}"


def _choice(prefix: str, group: str, value: str, options: list[str], is_sweep: bool) -> str:
    """The choice of a group's option."""
    if value in ("null", ""):
        if group in ("adapter", "callbacks", "strategy", "logger", "experiment", "debug") and value == "null":
            none = {"logger": "csv", "strategy": "single"}.get(group, "none")
            return f"{group}={none if none in options else 'null'}"
        raise UserError(f"{group}={value} chooses nothing: choose {', '.join(options)}")
    looks_like_path = bool(DATA_FILE.search(value)) or "/" in value or value.startswith("~") or Path(value).exists()
    if value not in options and looks_like_path and group in ("data", "model"):
        raise UserError(f"{group}={value} is no option of {group} ({', '.join(options)}): set {group}.path={value}")
    if value.endswith(".yaml"):
        name, folder = Path(value).stem, Path(value).parent
        own = "" if name in options else f" --config-dir {folder.parent}" if folder.name == group else ""
        raise UserError(
            f"{group}={value}: an option is named without folder and .yaml: {group}={name}{own}"
            + ("" if own or name in options else f", with the file in conf/{group}/ or in {group}/ of a --config-dir")
        )
    if value.startswith("[") and group not in ("callbacks", "logger"):
        raise UserError(f"{group}={value}: there is one {group} at a time: choose {', '.join(options)}")
    if "," in value and not value.startswith("[") and not is_sweep:
        raise UserError(f"{group}={value} has several values: add -m to train with each of them")
    # `+experiment=` is the form of other templates, where no experiment is a default.
    return f"{group}={value}"


def _refuse_option(command: str, word: str, rest: list[str]) -> NoReturn:
    name, _, value = word.lstrip("-").partition("=")
    name = name.replace("-", "_")
    here, settings = known_as(name), names(command)
    known = [setting for setting in settings if name in (setting, setting.rpartition(".")[2])]
    is_group = any(setting.startswith(f"{name}.") for setting in settings)  # --resume means no setting of ours
    if known and not (is_group and here):
        value = value or (rest[0] if rest and not rest[0].startswith("-") else "VALUE")
        raise UserError(f"{word}: settings are written without dashes: sft {command} {known[0]}={value}")
    advice = f"in its place: {here}" if here else f"settings are written NAME=VALUE; see sft {command} --help"
    raise UserError(f"there is no option {word}; {advice}")


def _advice_on_word(command: str, word: str) -> str:
    if word in groups()["experiment"]:
        return f"settings are written NAME=VALUE: experiment={word}"
    if DATA_FILE.search(word):
        return f"settings are written NAME=VALUE: data.path={word}"
    if Path(word).is_dir():
        return f"settings are written NAME=VALUE: model.path={word}, data.path={word}"
    return f"settings are written NAME=VALUE; sft {command} --help has examples"


def names(command: str) -> list[str]:
    """The dotted names of all settings that a command has a type for."""
    return list(_types(command))


def _kind(command: str, name: str) -> str | None:
    """`text` for a setting that takes any text; `other`; None for one that isn't known."""
    types = _types(command)
    return None if name not in types else "text" if _is_text(types[name]) else "other"


def _is_open(command: str, name: str) -> bool:
    """Whether a setting lies in a mapping of names of the user's own choice."""
    open_settings = {setting for setting, kind in _types(command).items() if kind == schema.Open or _takes_more(kind)}
    parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
    return any(parent in open_settings and parent not in schema.OPTIONS for parent in parents)


def _types(command: str) -> dict[str, Any]:
    """Each setting's type, of every option of each group."""
    model = schema.COMMANDS.get(command, schema.Train)
    types = dict(_fields(model, ""))
    if issubclass(model, schema.Train):
        for group, options in schema.OPTIONS.items():
            for option in options.values():
                types |= _fields(option, f"{group}.")
    return types


def _fields(model: type[BaseModel], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = schema.Open if field.annotation == dict[str, Any] else field.annotation
        if inner := nested(field.annotation):
            found |= _fields(inner, f"{prefix}{name}.")
    return found


def _takes_more(annotation: Any) -> bool:
    """Whether names of the user's own may stand beside those of a setting."""
    return isinstance(annotation, type) and issubclass(annotation, schema.OpenSettings)


def _is_text(annotation: Any) -> bool:
    """Whether a type takes any text, and otherwise no more than null or a list."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [part for part in parts if part is not type(None)]
        return any(map(_is_text, kinds)) and all(_is_text(kind) or _is_list(kind) for kind in kinds)
    if origin is Literal:
        return False
    return annotation is str or bool(parts and hasattr(annotation, "__metadata__") and _is_text(parts[0]))


def _is_list(annotation: Any) -> bool:
    parts = get_args(annotation)
    return get_origin(annotation) is list or bool(hasattr(annotation, "__metadata__") and _is_list(parts[0]))


def _is_setting(word: str) -> bool:
    return "=" in word and not Path(word).is_dir()


def _quoted(text: str) -> str:
    """A text in Hydra's grammar, in which it means only itself."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    return f'"{escaped}"'
