"""The day that a chat template sees."""

import pickle

from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.clock import settled, template_arguments

DATED = "{{ strftime_now('%d %b %Y') }}|{{ thinking | default('off') }}|{{ messages[0].content }}"
PLAIN = "{{ thinking | default('off') }}|{{ messages[0].content }}"


def rendered(chat_template: str, **template: object) -> str:
    # Pickled, as a worker process gets them.
    arguments = pickle.loads(pickle.dumps(template_arguments(chat_template, template)))
    return render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template=chat_template, **arguments)[0][0]


def test_a_template_sees_the_day_that_it_is_given() -> None:
    assert rendered(DATED, today="2024-02-29") == "29 Feb 2024|off|hi"


def test_other_arguments_reach_the_template_as_they_are() -> None:
    assert rendered(DATED, today="2025-12-31", thinking="high") == "31 Dec 2025|high|hi"
    assert rendered(PLAIN, today="2025-12-31", thinking=False) == "False|hi"
    assert template_arguments(PLAIN, {"today": "2025-12-31", "thinking": False}) == {"thinking": False}


def test_the_day_decides_a_rendering_only_where_the_template_asks_for_it() -> None:
    assert settled(DATED, {"today": None, "thinking": True}, "2025-01-02") == {"thinking": True, "today": "2025-01-02"}
    assert settled(DATED, {"today": "2024-02-29"}, "2025-01-02") == {"today": "2024-02-29"}
    assert settled(PLAIN, {"today": "2024-02-29"}, "2025-01-02") == {}
    assert settled({"default": PLAIN, "tool_use": DATED}, {}, "2025-01-02") == {"today": "2025-01-02"}
    assert settled(None, {}, "2025-01-02") == {}
