"""The day that a chat template sees."""

from datetime import date

from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.clock import pinned, settled

DATED = "{{ strftime_now('%d %b %Y') }}|{{ thinking | default('off') }}|{{ messages[0].content }}"
PLAIN = "{{ thinking | default('off') }}|{{ messages[0].content }}"


def rendered(chat_template: str, **template: object) -> str:
    text, arguments = pinned(chat_template, template)
    texts, _ = render_jinja_template([[{"role": "user", "content": "hi"}]], chat_template=text, **arguments)
    return texts[0]


def test_a_template_sees_the_day_that_it_is_given() -> None:
    assert rendered(DATED, today="2024-02-29") == "29 Feb 2024|off|hi"
    assert rendered("{{ strftime_now('%-d.%m.%y, %A: 100%%d') }}", today="2025-03-01") == "1.03.25, Saturday: 100%d"


def test_without_a_day_the_clock_is_the_real_one() -> None:
    assert rendered("{{ strftime_now('%Y-%m-%d') }}") == date.today().isoformat()


def test_a_template_may_ask_whether_there_is_a_clock_and_read_it_in_a_macro() -> None:
    text = (
        "{%- macro head() -%}{{ strftime_now(format='%Y') | int + 1 }}{%- endmacro -%}"
        "{%- if strftime_now is defined %}{{ head() }}{% endif %}"
    )
    assert rendered(text, today="2025-03-01") == "2026"


def test_a_pinned_template_writes_the_same_blanks_and_line_breaks() -> None:
    for text in (
        "\n  {% if true %}\n  x\n  {% endif %}\n{# strftime_now #}",
        "  {% if strftime_now %}\n\nx{% endif %}\n",
    ):
        assert rendered(text, today="2025-03-01") == rendered(text)


def test_other_arguments_reach_the_template_as_they_are() -> None:
    assert rendered(DATED, today="2025-12-31", thinking="high") == "31 Dec 2025|high|hi"
    assert rendered(PLAIN, today="2025-12-31", thinking=False) == "False|hi"
    assert pinned(PLAIN, {"today": "2025-12-31", "thinking": False}) == (PLAIN, {"thinking": False})


def test_the_day_decides_a_rendering_only_where_the_template_asks_for_it() -> None:
    assert settled(DATED, {"today": None, "thinking": True}, lambda: "2025-01-02") == {
        "thinking": True,
        "today": "2025-01-02",
    }
    assert settled(DATED, {"today": "2024-02-29"}, lambda: "2025-01-02") == {"today": "2024-02-29"}
    assert settled(PLAIN, {"today": "2024-02-29"}, lambda: "2025-01-02") == {}
    assert settled({"default": PLAIN, "tool_use": DATED}, {}, lambda: "2025-01-02") == {"today": "2025-01-02"}
    assert settled(None, {}, lambda: "2025-01-02") == {}
