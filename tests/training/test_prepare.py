"""What a run is made of: the day and the arguments that its chat template sees, and where its responses end."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from data.conftest import CHAT, data_config, word_tokenizer
from sft.data import clock
from sft.data.conversation import messages, prompt_response
from sft.data.dataset import Datasets
from sft.data.prompt import served_ids
from sft.data.rows import Source
from sft.runs.run import Run
from sft.training import prepare
from sft.training.prepare import Prepared, template_settings

DATED = "{{ strftime_now('%Y') }}{% if thinking %} hmm{% endif %}" + CHAT


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets the day of this machine."""
    return lambda day: monkeypatch.setattr(prepare, "today", lambda: day)


def begun(folder: Path, day: str) -> Run:
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text(json.dumps({"started": "2020-01-01T00:00:00", "today": day}))
    return Run(folder)


def test_the_day_is_that_on_which_the_run_was_begun(tmp_path: Path, at: Callable[[str], None]) -> None:
    at("2025-06-07")
    tokenizer = word_tokenizer(DATED)
    assert template_settings({"today": None}, tokenizer, None) == {"today": "2025-06-07"}
    assert template_settings({}, tokenizer, Run(tmp_path / "new")) == {"today": "2025-06-07"}
    run = begun(tmp_path / "old", "2024-02-29")
    assert template_settings({"thinking": True}, tokenizer, run) == {"thinking": True, "today": "2024-02-29"}
    assert template_settings({"today": "2023-01-01"}, tokenizer, run) == {"today": "2023-01-01"}
    assert template_settings({"thinking": True, "today": None}, word_tokenizer(), run) == {"thinking": True}


def test_another_rank_takes_the_day_that_the_first_has_recorded(tmp_path: Path, at: Callable[[str], None]) -> None:
    at("2024-03-01")  # past midnight, and the first rank began before
    answers: list[object] = []

    def other_rank() -> None:
        answers.append(template_settings({}, word_tokenizer(DATED), Run(tmp_path / "run"), main=False))

    thread = Thread(target=other_rank)
    thread.start()
    time.sleep(0.3)
    assert not answers
    begun(tmp_path / "run", "2024-02-29")
    thread.join(timeout=10)
    assert answers == [{"today": "2024-02-29"}]


def stores(tmp_path: Path, template: str | None, *settings: dict[str, object]) -> list[Any]:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "hi", "response": "yes"}\n')
    config = data_config(conversation=prompt_response, max_length=100, cache_dir=str(tmp_path / "cache"))
    tokenizer = word_tokenizer(template)
    log: Callable[[str], None] = lambda line: None  # noqa: E731
    return [config.store([Source(str(file))], tokenizer, template=each, log=log) for each in settings]


def test_a_store_built_next_week_is_the_same(tmp_path: Path) -> None:
    first, again, other = stores(tmp_path, DATED, *({"today": f"{year}-01-01"} for year in (2024, 2024, 2025)))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    plain = stores(tmp_path, CHAT, {}, {"thinking": True})
    assert plain[0].fingerprint != plain[1].fingerprint


def test_arguments_reach_what_is_trained_and_what_is_served(tmp_path: Path) -> None:
    bare, thinking = stores(tmp_path, DATED, {"today": "2024-01-01"}, {"today": "2024-01-01", "thinking": True})
    assert bare[0][0].tolist() == [0, 4, 11, 6, 9, 5, 12, 6]  # 2024 is no word of this tokenizer's
    assert thinking[0][0].tolist() == [0, 10, 17, 4, 11, 6, 9, 5, 12, 6]
    served = served_ids(word_tokenizer(DATED), prompt_response, "hi", {"today": "2024-01-01", "thinking": True})
    assert served == [0, 10, 17, 4, 11, 6, 9, 5]


def prepared(tokenizer: Any, train: Any) -> Prepared:
    splits = Datasets(train, None, {}, {})
    return Prepared(None, tokenizer, splits, None, {})  # type: ignore[arg-type]


def test_responses_in_the_middle_of_a_sample_end_somewhere_too(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}"
        "<|call|>{% else %}<|end|>{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    turns = [
        *({"role": "user", "content": "hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}),
        *({"role": "tool", "content": "good"}, {"role": "assistant", "content": "yes"}),
        *({"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}),
    ]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    config = data_config(conversation=messages, max_length=100, cache_dir=str(tmp_path / "cache"))
    tokenizer = word_tokenizer(template)
    store = config.store([Source(str(tmp_path / "rows.jsonl"))], tokenizer, log=lambda line: None)
    assert [int(store[0][0][-1]), len(store)] == [6, 1]
    assert prepared(tokenizer, store).stop_token_ids == [6, 7]  # twice <|end|>, once <|call|>
    for counts in store.counts:
        del counts["stops"]  # type: ignore[misc]
    assert prepared(tokenizer, store).stop_token_ids == [6]


def test_today_is_this_machines() -> None:
    assert clock.today() == time.strftime("%Y-%m-%d")
