"""A chat template that runs for ever is stopped, wherever it is rendered."""

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
from transformers import PreTrainedTokenizerFast

from sft.data import bounded, chat_template
from sft.data.bounded import Endless
from sft.data.chat_template import ChatTemplate, Unending

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ENDLESS = (
    LOOP,
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% generation %}" + LOOP + "{% endgeneration %}",
    "{{ messages[0].content * 20000000 }}",
    "{{ 10 ** 10 ** 10 }}",
)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "TICK", 0.05)
    monkeypatch.setattr(chat_template, "SECONDS", 0.2)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("template", ENDLESS)
def test_it_is_stopped_with_its_name(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = template
    made = ChatTemplate(tokenizer)
    for render in (lambda: made.render([{"role": "user", "content": "x"}]), lambda: made.stop):
        with pytest.raises(
            Unending, match=r"the chat template \(model\.chat_template, or that of .*: correct it"
        ) as found:
            render()
        assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


@pytest.mark.usefixtures("short")
def test_threads_are_stopped_one_by_one_and_what_ends_in_time_is_not() -> None:
    def ends() -> int:
        return sum(range(10))

    def never() -> int:
        while True:
            pass

    def call(of: Callable[[], int]) -> object:
        try:
            return bounded.bounded(0.2, of)
        except Endless:
            return "stopped"

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, [ends, never, ends, never])) == [45, "stopped", 45, "stopped"]
    assert [call(ends) for _ in range(1000)] == [45] * 1000
    assert threading.main_thread().is_alive()
