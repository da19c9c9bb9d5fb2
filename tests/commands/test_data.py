"""Rows of any shape from the command line: previewed without a setting for it, trained, and read again by the run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from running import Sft
from sft.data.shapes import SHAPES

CHAT = [{"role": "user", "content": "Name a lake."}, {"role": "assistant", "content": "Como."}]
CALLS = Path(__file__).parents[3] / "shared/data/tool_calls/glaive_toolcall_en_demo.json"
GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"
# A template of Qwen's form, with tools and calls.
WITH_CALLS = (
    "{% for tool in tools or [] %}<tool>{{ tool | tojson }}</tool>\n{% endfor %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={name}"


def preview(sft: Sft, *settings: str) -> int:
    """Of a model with room for long conversations, which is never made."""
    others = [setting for setting in sft.settings if not setting.startswith(("data.path=", "model.path="))]
    tokenizer = sft.settings[0].replace("model.path=", "model.tokenizer=")
    model = ("model=scratch", tokenizer, "model.config.max_position_embeddings=16384", "data.max_length=16384")
    return sft("preview", *others, *model, "data.val_size=0", "preview.packs=3", *settings)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"question": "2 + 2?", "answer": 4}, "user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n[[4<|im_end|>]]"),
        (
            {"instruction": "Say it twice.", "input": "ja", "output": "ja ja", "system": "Speak German."},
            "Speak German.<|im_end|>\n<|im_start|>user\nSay it twice.\nja<|im_end|>\n<|im_start|>assistant\n[[ja ja",
        ),
        ({"messages": json.dumps(CHAT)}, "user\nName a lake.<|im_end|>\n<|im_start|>assistant\n[[Como.<|im_end|>]]"),
        (
            {"messages": [CHAT[0], {**CHAT[1], "weight": 0}, *CHAT]},
            "assistant\nComo.<|im_end|>\n<|im_start|>user\nName a lake.<|im_end|>\n<|im_start|>assistant\n[[Como.<|im_",
        ),
        (
            {"prompt": [*CHAT, CHAT[0]], "completion": CHAT[1:]},
            "assistant\nComo.<|im_end|>\n<|im_start|>user\nName a lake.<|im_end|>\n<|im_start|>assistant\n[[Como.<|im_",
        ),
        (
            {"conversations": [{"from": "human", "value": "A bird?"}, {"from": "gpt", "value": "Un merle."}]}
            | {"system": "Answer in French.", "tools": ""},
            "Answer in French.<|im_end|>\n<|im_start|>user\nA bird?<|im_end|>\n<|im_start|>assistant\n[[Un merle.",
        ),
        ({"text": "abc"}, "a[[bc<|endoftext|>]]"),
        ({"input_ids": [70, 71, 72, 73], "labels": [-100, -100, 72, 73]}, "[["),
    ],
)  # fmt: skip
def test_a_file_of_any_shape_is_previewed_by_its_path(
    row: dict[str, Any], shown: str, sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview(sft, write("my.jsonl", [row])) == 0
    printed = capsys.readouterr()
    assert shown in printed.out
    assert re.match(r"my\.jsonl: .*\(columns? '", printed.err)


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"messages": CHAT, "label": False}, "preference rows, whose column 'label' says"),
        ({"chosen": CHAT, "rejected": CHAT}, "preference rows, with a chosen and a rejected answer"),
        ({"prompt": "?", "response": "!", "answer": "!!"}, "its rows have more than one shape"),
        ({"x": [1]}, "no shape fits its rows"),
    ],
)
def test_rows_that_can_not_be_meant_are_refused(
    row: dict[str, Any], line: str, sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    assert preview(sft, write("my.jsonl", [row, row])) == 2
    assert capsys.readouterr().err.startswith(f"sft: my.jsonl: {line}")


def test_a_run_of_auto_is_the_run_of_its_shape_and_reads_other_files_as_that(
    sft: Sft, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("my.jsonl", [{"instruction": f"Say {n}.", "input": "now", "output": f"{n}"} for n in range(20)])
    settings = [setting for setting in sft.settings if not setting.startswith("data.path=")] + [path, "max_steps=1"]
    assert sft("train", *settings) == 0
    assert sft("train", *settings, "data=alpaca") == 0
    printed = capsys.readouterr().out
    (run,) = (folder for folder in Path("runs").iterdir() if folder.name.startswith("sft-"))
    assert f"{run} is finished: nothing to do" in printed
    assert f"_target_: {SHAPES['alpaca'].target}" in (run / "config.yaml").read_text()

    write("held_out.jsonl", [{"instruction": "Say 3.", "input": "now", "output": "3"}])
    assert sft("score", f"run={run.name}", "data=held_out.jsonl") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["log_p_response"] < 0
    write("asked.jsonl", [{"instruction": "Say 3.", "input": "now"}, {"instruction": "Say 4.", "output": "4"}])
    assert sft("generate", f"run={run.name}", "file=asked.jsonl", "max_new_tokens=2") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line.get("reference")) for line in lines] == [("Say 3.\nnow", None), ("Say 4.", "4")]

    write("other.jsonl", [{"question": "Say 3.", "answer": "3"}])
    assert sft("score", f"run={run.name}", "data=other.jsonl") == 2
    assert capsys.readouterr().err == (
        "sft: other.jsonl: no column 'instruction': the columns are 'question', 'answer': rename them as in the run's "
        f"data ({run}/config.yaml, data.conversation)\n"
    )
    assert sft("generate", f"run={run.name}", "file=other.jsonl") == 2
    assert "rename the one with the prompts, because the run was trained with data.conversation.instruction=" in (
        capsys.readouterr().err
    )


def test_a_sweep_of_auto_is_of_runs_of_the_shape(sft: Sft) -> None:
    path = write("my.jsonl", [{"question": f"Say {n}.", "answer": f"{n}"} for n in range(20)])
    settings = [setting for setting in sft.settings if not setting.startswith(("data.path=", "optimizer.lr="))]
    assert sft("train", "-m", *settings, path, "max_steps=1", "export=false", "optimizer.lr=1e-3,1e-4") == 0
    configs = [config.read_text() for config in Path("runs").glob("sft-*/config.yaml")]
    assert len(configs) == 2 and all("prompt: question" in config for config in configs)


@pytest.mark.skipif(not CALLS.exists(), reason="needs ../shared/data/tool_calls beside the project")
def test_real_tool_calls_are_previewed_by_their_path(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    Path("calls.jinja").write_text(WITH_CALLS)
    assert preview(sft, f"data.path={CALLS}", "model.chat_template=calls.jinja") == 0
    printed = capsys.readouterr()
    assert "glaive_toolcall_en_demo.json: ShareGPT's conversations with tools, 2 columns (" in printed.err
    assert re.search(r"samples +300 training", printed.out)
    assert re.search(r'\[\[<call>\{"name": "\w+", "arguments": \{"', printed.out)


@pytest.mark.skipif(not GSM8K.exists(), reason="needs ../shared/data/gsm8k beside the project")
def test_question_and_answer_are_found_in_gsm8k(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(sft, f"data.path={GSM8K}", "data.split=train[:200]") == 0
    printed = capsys.readouterr()
    assert "data.conversation.prompt=question data.conversation.response=answer" in printed.err
    assert re.search(r"samples +200 training", printed.out)
