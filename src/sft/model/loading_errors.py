"""What transformers and torch raise while a model is read or built, as one line: what, which, why, and what to do."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from sft.errors import UserError, disk_is_full

REMOTE_CODE = "trust_remote_code"
SPEAKING = {"OSError", "ValueError", "SafetensorError", "RuntimeError"}  # their messages are sentences
LONGEST = 300  # characters of a message


@contextmanager
def loading(what: str, source: str, architecture: str = "") -> Iterator[None]:
    """Whatever is raised meanwhile becomes a UserError. `what`: model or tokenizer; `source`: its folder or name."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # models' own code may raise anything
        if disk_is_full(error):
            raise
        raise not_loaded(what, source, error, architecture) from error


def not_loaded(what: str, source: str, error: Exception, architecture: str = "") -> UserError:
    kind = type(error).__name__
    message = " ".join(str(error).split())[:LONGEST] or "no message"
    named = f"{kind}: {message}" if kind not in SPEAKING else message
    todo = ""
    if REMOTE_CODE in str(error):
        message = "its folder holds Python code of its own, which is run to load it"
        named, todo = message, f": read it, then set model.{REMOTE_CODE}=true"
    elif "Weights only load failed" in str(error):
        named = "its weights are a pickle that holds more than tensors"
        todo = ", and nothing of it is run: take weights in safetensors, or convert them where you trust them"
    elif isinstance(error, ImportError):
        todo = f": pip install {package}" if (package := _package(error)) else ""
    elif kind not in SPEAKING and what == "model":
        todo = ": correct its config.json or model.config, or take a transformers that knows this model"
    return UserError(f"the {what} {source}{architecture and f' ({architecture})'} can't be loaded: {named}{todo}")


def _package(error: ImportError) -> str | None:
    """What to install, as the error says it."""
    text = str(error)
    if given := re.search(r"pip install (?:-U )?([A-Za-z][\w.\-\[\], ]*)", text):
        return given[1].strip().rstrip(".`")
    if named := re.search(r"requires the (\S+) library|No module named '(\w+)", text):
        return named[1] or named[2]
    return None
