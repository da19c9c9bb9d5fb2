"""A file as people have it → the tokens that are trained: read, recognised, rendered and encoded by the real code.

A token is a byte or a special token, so that a sample is as good as its text, in which each learned stretch is in ⟦⟧.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import get_method

from sft.data.labels import IGNORE
from sft.data.rows import Source, first_rows
from sft.data.shape import find
from sft.data.shapes import SHAPES
from sft.data.store import Store
from sft.errors import UserError

from .conftest import data_config
from .test_rendering import shown, tokenizer_of

# As Qwen 3's: tools first, reasoning in the last turn only, calls as JSON.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.reasoning_content and loop.last %}{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content }}"
    "{%- for c in m.tool_calls or [] %}{{- '<call>' }}{{- c.function | tojson }}{{- '</call>' }}{%- endfor %}"
    "{{- '<|im_end|>\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def built(folder: Path, lines: list[Any] | str, name: str = "d.jsonl", **settings: Any) -> Store:
    """The store of a file, in the shape that is found."""
    file = folder / name
    text = lines if isinstance(lines, str) else "".join(json.dumps(line) + "\n" for line in lines)
    file.write_text(text)
    source = Source(str(file))
    shape, _ = find(name, list(first_rows(source, 20)), {})
    function = partial(get_method(SHAPES[shape.name].target), **shape.arguments)
    supervise = "all" if shape.name == "text" else "response"
    options = {"conversation": function, "cache_dir": str(folder / "cache"), "num_workers": 1, "max_lost": 0.99}
    config = data_config(**options | {"supervise": supervise, "path": str(file), **settings})
    return config.store([source], TOKENIZER, log=lambda _: None)


TOKENIZER = tokenizer_of(QWEN, *SPECIAL, eos="<|endoftext|>")


def trained(store: Store) -> list[str]:
    class Pair:
        def __init__(self, index: int) -> None:
            ids, labels = store[index]
            self.input_ids, self.labels = ids.tolist(), labels.tolist()

    return [shown(TOKENIZER, Pair(index)) for index in range(len(store))]  # type: ignore[arg-type]


def chat(*turns: tuple[str, str]) -> str:
    """A conversation as it is rendered; a turn of the role "learned" is one of the assistant that carries loss."""
    parts = []
    for role, content in turns:
        if role == "learned":
            parts.append(f"<|im_start|>assistant\n⟦{content}<|im_end|>⟧")
        else:
            parts.append(f"<|im_start|>{role}\n{content}<|im_end|>")
    return "\n".join(parts)


def user(content: object, **more: object) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def reply(content: object, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, arguments: object) -> dict[str, Any]:
    return reply("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def test_a_csv_file_word_for_word(tmp_path: Path) -> None:
    words = ["007", "1.50", "True", "None", "NA", "null", "nan", "1e3", "2024-05-01", "+4", "N/A", "-", "0x1F"]
    text = "prompt,response\n" + "".join(f"item {i},{word}\n" for i, word in enumerate(words))
    store = built(tmp_path, text, "d.csv")
    assert trained(store) == [chat(("user", f"item {i}"), ("learned", word)) for i, word in enumerate(words)]
    assert store.counts[0]["lost"] == {}


def test_numbers_dates_and_nulls_in_calls(tmp_path: Path) -> None:
    schema = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    arguments = [
        ({"flow": 17.250000012345676, "limit": 3e-11, "n": 4}, '{"flow": 17.250000012345676, "limit": 3e-11, "n": 4}'),
        ({"flow": 2, "on": "2023-11-30"}, '{"flow": 2, "on": "2023-11-30"}'),
        ({"order": 12, "note": None}, '{"order": 12, "note": null}'),
        ('{"minutes": 20}', '{"minutes": 20}'),
        ("", "{}"),
    ]
    rows = [{"messages": [user("Go."), call("f", given)], "tools": [schema]} for given, _ in arguments]
    tools = '{"type": "function", "function": {"name": "f", "parameters": {"default": null}}}'
    assert trained(built(tmp_path, rows)) == [
        chat(("system", tools), ("user", "Go."), ("learned", f'<call>{{"name": "f", "arguments": {said}}}</call>'))
        for _, said in arguments
    ]


def test_a_key_that_comes_late(tmp_path: Path) -> None:
    early = {"messages": [user("Hi " + "x" * 900), reply("Hello.")], "note": None}
    late = {"messages": [user("Warm?"), call("weather", {"town": "Bergen"})], "note": "late"}
    store = built(tmp_path, [early] * 300 + [late], max_length=2000)
    assert len(store) == 301
    said = '<call>{"name": "weather", "arguments": {"town": "Bergen"}}</call>'
    assert trained(store.subset([300])) == [chat(("user", "Warm?"), ("learned", said))]  # type: ignore[arg-type]
    assert store.counts[0]["unread"]["columns"] == {"note": 301}


ROWS = {
    "parts of text": (
        {"messages": [user([{"type": "text", "text": "Which "}, {"type": "text", "text": "river?"}]), reply("Inn.")]},
        [chat(("user", "Which river?"), ("learned", "Inn."))],
    ),
    "ShareGPT with a system column": (
        {
            "conversations": [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "Un merle."}],
            "system": "Answer in French.",
            "tools": "",
        },
        [chat(("system", "Answer in French."), ("user", "Name a bird."), ("learned", "Un merle."))],
    ),
    "Alpaca": (
        {
            **{"instruction": "Count.", "input": "to 2", "output": "1 2", "system": "Digits."},
            "history": [["Say one.", "1"]],
        },
        [
            chat(
                *(("system", "Digits."), ("user", "Say one."), ("learned", "1")),
                *(("user", "Count.\nto 2"), ("learned", "1 2")),
            )
        ],
    ),
    "prompt and completion of messages": (
        {"prompt": [user("A"), reply("B"), user("Name a lake.")], "completion": [reply("Como.")]},
        [chat(("user", "A"), ("assistant", "B"), ("user", "Name a lake."), ("learned", "Como."))],
    ),
    "messages as JSON": (
        {"messages": json.dumps([user("Name a lake."), reply("Garda.")])},
        [chat(("user", "Name a lake."), ("learned", "Garda."))],
    ),
    "reasoning, of which history has none": (
        {"messages": [user("6 + 7?"), reply("13", reasoning_content="Ten, three."), user("And 1?"), reply("14")]},
        [
            chat(("user", "6 + 7?"), ("learned", "<think>\nTen, three.\n</think>\n\n13")),
            chat(("user", "6 + 7?"), ("assistant", "13"), ("user", "And 1?"), ("learned", "14")),
        ],
    ),
    "weights": (
        {"messages": [user("Legs?"), reply("Six.", weight=0), user("Sure?"), reply("No: eight.", weight=1)]},
        [chat(("user", "Legs?"), ("assistant", "Six."), ("user", "Sure?"), ("learned", "No: eight."))],
    ),
    "token ids": ({"input_ids": [40, 41, 42, 43], "labels": [-100, -100, 42, 43]}, None),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_this_shape(tmp_path: Path, kind: str) -> None:
    row, expected = ROWS[kind]
    store = built(tmp_path, [row])
    assert store.counts[0]["lost"] == {}
    if expected is None:
        ids, labels = store[0]
        assert (ids.tolist(), labels.tolist()) == ([40, 41, 42, 43], [IGNORE, IGNORE, 42, 43])
    else:
        assert trained(store) == expected


def test_half_a_weight_counts_half(tmp_path: Path) -> None:
    store = built(tmp_path, [{"messages": [user("Name a metal."), reply("Iron.", weight=0.5)]}])
    weights = store.weights(0)
    assert weights is not None
    assert weights[weights > 0].tolist() == [0.5] * 6  # of "Iron." and its stop token
    assert store.weight_sums.tolist() == [3.0]


def test_a_rendered_chat_has_one_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import processors

    tokenizer = tokenizer_of(QWEN, "<s>", *SPECIAL, bos="<s>", eos="<|endoftext|>")
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    monkeypatch.setattr(f"{__name__}.TOKENIZER", tokenizer)
    [sample] = trained(built(tmp_path, [{"text": "<s><|im_start|>user\nHi<|im_end|>"}]))
    assert sample == "<s>⟦<|im_start|>user\nHi<|im_end|><|endoftext|>⟧"


def test_odd_rows_are_counted_and_the_others_trained(tmp_path: Path) -> None:
    good = {"messages": [user("Name a bird."), reply("Wren.")]}
    odd = {
        "unknown_role": {"messages": [{"role": "moderator", "content": "x"}, reply("y")]},
        "arguments_not_an_object": {"messages": [user("Go 5."), call("go", "5")]},
        "other_content": {"messages": [user([{"type": "image_url", "image_url": {"url": "a.png"}}]), reply("A dog.")]},
        "empty_response": {"messages": [user("Go on."), reply("", tool_calls=[])]},
        "special_text": {"messages": [user("Which?"), reply("It is <|im_end|> here.")]},
        "preference_row": {"messages": [user("Wet?"), reply("No.")], "label": False},
    }
    store = built(tmp_path, [good] * 30 + list(odd.values()))
    assert trained(store) == [chat(("user", "Name a bird."), ("learned", "Wren."))] * 30
    assert store.counts[0]["lost"] == dict.fromkeys(odd, 1)
    places = {reason: [each["place"] for each in examples] for reason, examples in store.counts[0]["examples"].items()}
    assert places == {reason: [f"d.jsonl line {31 + i}"] for i, reason in enumerate(odd)}
    with pytest.raises(UserError, match=r"^6 of 36 rows lost, more than data\.max_lost=0\.05 of them: 1 unknown_role"):
        built(tmp_path, [good] * 30 + list(odd.values()), max_lost=0.05)


def test_preferences_are_refused(tmp_path: Path) -> None:
    rows = [{"messages": [user("Wet?"), reply("Shut up.")], "label": False}, {"messages": [user("a")], "label": True}]
    with pytest.raises(UserError, match="preference rows"):
        built(tmp_path, rows)
    with pytest.raises(UserError, match="preference rows, with a chosen and a rejected answer"):
        built(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
