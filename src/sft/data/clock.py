"""The day that a chat template sees. Some write today's date into each conversation (Llama 3.2, gpt-oss), and then a
rendering is a function of its rows only if the clock stands still."""

from collections.abc import Mapping
from datetime import date, datetime
from functools import partial

CLOCK = "strftime_now"  # transformers' function for templates; an argument of that name stands before it
TODAY = "today"  # the one name in `model.template` that is ours: YYYY-MM-DD


def on_day(day: str, form: str) -> str:
    """`strftime_now` on that day, at midnight."""
    return datetime.fromisoformat(day).strftime(form)


def reads_clock(chat_template: str | Mapping[str, str] | None) -> bool:
    """Whether a chat template, or one of several by name, asks for the date."""
    templates = chat_template.values() if isinstance(chat_template, Mapping) else [chat_template or ""]
    return any(CLOCK in template for template in templates)


def settled(
    chat_template: str | Mapping[str, str] | None, template: Mapping[str, object], day: str
) -> dict[str, object]:
    """What of `model.template` decides a rendering: `today` is `day` where it isn't set, and left out where the chat
    template doesn't ask for the date."""
    arguments = {name: value for name, value in template.items() if name != TODAY}
    return {**arguments, TODAY: template.get(TODAY) or day} if reads_clock(chat_template) else arguments


def template_arguments(
    chat_template: str | Mapping[str, str] | None, template: Mapping[str, object]
) -> dict[str, object]:
    """The arguments to render with: those of `model.template` without `today`, and the pinned clock where the chat
    template asks for the date. Without a `today` the clock is the real one."""
    arguments = {name: value for name, value in template.items() if name != TODAY}
    day = template.get(TODAY)
    return {**arguments, CLOCK: partial(on_day, str(day))} if day and reads_clock(chat_template) else arguments


def today() -> str:
    """This machine's day, YYYY-MM-DD."""
    return date.today().isoformat()
