"""What looks like a key or a password is in no file that a run writes, nor in what it prints or gives to trackers."""

import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

HIDDEN = "***"
# What keys of settings and variables hold that nobody else may read. Not max_new_tokens, stop_token_ids or tokenizer.
SECRET = re.compile(
    r"api_?key|access_?key|private_?key|passw|passphrase|secret|credential|authorization|token(?!iz|s|_id)",
    re.IGNORECASE,
)
_KEY = rf"[\w.-]*(?:{SECRET.pattern})[\w.-]*"
# In running text and on a command line, where each value ends with its word.
_ASSIGNED = re.compile(rf"({_KEY}[\"']?\s*[:=]\s*[\"']?(?:bearer\s+)?)[^\s\"',)}}]+", re.IGNORECASE)
# In code, where most values are names: a quoted text, or what a shell is given.
_IN_CODE = re.compile(
    rf"({_KEY}[\"'\])]*\s*[:=]+\s*[rbuf]?)([\"'])[^\n]+?\2|((?:^|[\s;+-]){_KEY}=)[^\s\"'$(),]+(?=[\s;]|$)",
    re.IGNORECASE | re.MULTILINE,
)
# What keys look like wherever they are issued.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|AIza[\w-]{30,}|nvapi-[\w-]{20,}|wandb_v\d_\w{20,}|ya29\.[\w-]{20,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|(?<=\bBearer )[\w.~+/=-]{16,}",
)
_IN_URL = re.compile(r"(\w://[^\s/:@\"']*:)[^\s/@\"']+(?=@)")
_PLACES = re.compile(r"[/~.]|\w:\\")  # of files that hold secrets, and are none


_known: set[str] = set()  # of this command's settings


def learn(settings: Mapping[str, object]) -> None:
    """Notes the secrets of a command's settings, so that nothing here needs to be given them."""
    _known.clear()
    _known.update(_secrets(settings))


def redacted(text: str, settings: Mapping[str, object] | None = None) -> str:
    """The text without what is secret: values of the environment and of settings whose names say so, wherever they
    stand; what is assigned to such a name; and what looks like a key."""
    return _ASSIGNED.sub(rf"\1{HIDDEN}", hidden(text, _secrets(settings or {})))


def of_code(text: str, settings: Mapping[str, object] | None = None) -> str:
    """The same for a piece of code, whose variables may be called `token`."""
    return _IN_CODE.sub(
        lambda found: f"{found[1] or found[3]}{found[2] or ''}{HIDDEN}{found[2] or ''}",
        hidden(text, _secrets(settings or {})),
    )


def hidden(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without these secrets, those of the environment, and what looks like a key."""
    for secret in sorted({*secrets, *_known, *_of_environment(tuple(os.environ.items()))}, key=len, reverse=True):
        for form in {secret, json.dumps(secret)[1:-1], shlex.quote(secret)}:
            text = text.replace(form, HIDDEN)
    return _IN_URL.sub(rf"\1{HIDDEN}", _SHAPES.sub(HIDDEN, text))


def without_secrets(value: Any, settings: Mapping[str, object] | None = None) -> Any:  # type: ignore[explicit-any]
    """A configuration, or another nested value, with the same parts. `settings`: whose secrets may be in it; its own,
    if it isn't given. A text that speaks of a password stays as it is."""
    return _cleaned(value, _secrets(value if settings is None else settings))


def _cleaned(value: Any, secrets: set[str]) -> Any:  # type: ignore[explicit-any]
    if isinstance(value, Mapping):
        return {
            key: _hide(inner) if SECRET.search(str(key)) else _cleaned(inner, secrets) for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [_cleaned(inner, secrets) for inner in value]
    return hidden(value, secrets) if isinstance(value, str) else value


def _hide(value: Any) -> Any:  # type: ignore[explicit-any]
    if isinstance(value, Mapping):
        return {key: _hide(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_hide(inner) for inner in value]
    return HIDDEN if _is_secret(value) else value


def _secrets(value: object, inside: bool = False) -> set[str]:
    if isinstance(value, Mapping):
        pairs = value.items()
        return {text for key, inner in pairs for text in _secrets(inner, inside or bool(SECRET.search(str(key))))}
    if isinstance(value, list | tuple):
        return {text for inner in value for text in _secrets(inner, inside)}
    return {str(value)} if inside and _is_secret(value) else set()


def _is_secret(value: object) -> bool:
    """Not `true`, `null` or 3, nor a special token such as <|im_end|>."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return False
    return len(str(value)) > 3 and not re.fullmatch(r"<.*>|\[[A-Z]+\]", str(value)) and value != HIDDEN


@lru_cache(maxsize=1)
def _of_environment(variables: tuple[tuple[str, str], ...]) -> frozenset[str]:
    """Values long enough to stand for nothing else."""
    named = (value for name, value in variables if SECRET.search(name))
    return frozenset(value for value in named if len(value) >= 8 and not _PLACES.match(value))
