"""The arguments of a chat template, and the day that it sees. Some templates write today's date into each conversation
(Llama 3.2, gpt-oss), and then a rendering is a function of its rows only if the clock stands still."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime

from sft.errors import UserError
from sft.runs.identity import TODAY

CLOCK = "strftime_now"  # transformers' function for templates
GIVEN = ("messages", "tools", "documents", "add_generation_prompt", CLOCK)
# A macro of the clock's name stands before the function. transformers passes a template nothing that can be called,
# and trims the line break after a block, so that what follows still begins a line.
MACRO = """\
{%- macro strftime_now(format) -%}
{%- set written = namespace(text=format) -%}
{%- for code, value in CODES -%}{%- set written.text = written.text.replace(code, value) -%}{%- endfor -%}
{{- written.text -}}
{%- endmacro %}
"""


def reads_clock(chat_template: str | Mapping[str, str] | None) -> bool:
    """Whether a chat template, or one of several by name, asks for the date."""
    templates = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template or ""]
    return any(CLOCK in template for template in templates)


def settled(
    chat_template: str | Mapping[str, str] | None, template: Mapping[str, object], day: Callable[[], str]
) -> dict[str, object]:
    """What of `model.template` decides a rendering: `today` is that of `day` where it isn't set, and left out where the
    chat template doesn't ask for the date."""
    arguments = {name: value for name, value in template.items() if name != TODAY}
    return {**arguments, TODAY: template.get(TODAY) or day()} if reads_clock(chat_template) else arguments


def check_arguments(chat_template: str | Mapping[str, str] | None, template: Mapping[str, object]) -> None:
    """UserError for an argument that the chat template doesn't read, or that isn't the user's to give."""
    templates = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template or ""]
    words = set(re.findall(r"\w+", "\n".join(templates)))
    for name in template.keys() - {TODAY}:
        if name in GIVEN:
            raise UserError(f"model.template.{name}: what the chat template gets under that name is not for a setting")
        if name not in words:
            near = difflib.get_close_matches(name, words, n=1)
            raise UserError(
                f"model.template.{name}: the chat template reads nothing of that name"
                + (f": did you mean {near[0]}?" if near else ", so it would change nothing: leave it out")
            )


def pinned(chat_template: str, template: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The chat template to render with, whose clock stands on `today` where that is given, and the arguments to render
    it with: those of `model.template` without `today`."""
    arguments = {name: value for name, value in template.items() if name != TODAY}
    day = template.get(TODAY)
    if not day or not reads_clock(chat_template):
        return chat_template, arguments
    midnight = datetime.fromisoformat(str(day))
    codes = sorted(set(re.findall(r"%-?[A-Za-z]", chat_template)))
    # %% last, by way of a sign that no format has: its second % begins no code.
    values = [["%%", "\0"], *([code, midnight.strftime(code)] for code in codes), ["\0", "%"]]
    return MACRO.replace("CODES", json.dumps(values)) + chat_template, arguments


def today() -> str:
    """This machine's day, YYYY-MM-DD."""
    return date.today().isoformat()
