"""data=auto is the shape that the rows have, before a run is named: the same run as with the shape's own name."""

import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sft.config import CONF
from sft.data.shapes import SHAPES
from sft.errors import UserError
from sft.runs.identity import identity
from sft.training.shape import settle_data

CHAT = [{"role": "user", "content": "Name a lake."}, {"role": "assistant", "content": "Como."}]
SHAREGPT = [{"from": "human", "value": "Name a lake."}, {"from": "gpt", "value": "Como."}]


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["model.path=m", *overrides])


def plain(settings: DictConfig) -> Any:
    return OmegaConf.to_container(settings, resolve=True)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.path={path}"


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("prompt_response", {"prompt": "?", "response": "!"}),
        ("alpaca", {"instruction": "?", "input": "", "output": "!"}),
        ("messages", {"messages": CHAT}),
        ("sharegpt", {"conversations": SHAREGPT}),
        ("conversational", {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        ("pretokenized", {"input_ids": [1], "labels": [1]}),
        ("text", {"text": "abc"}),
    ],
)
def test_auto_is_the_same_run_as_the_shapes_own_name(name: str, row: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", row)
    found, named = config(path), config(path, f"data={name}")
    settle_data(found)
    settle_data(named)
    assert plain(found) == plain(named)
    assert identity(plain(found)) == identity(plain(named))


def test_every_shape_is_a_file_of_conf() -> None:
    for name, shape in SHAPES.items():
        settings = plain(config(f"data={name}"))["data"]["conversation"]
        assert settings == {"_target_": shape.target, "_partial_": True, **shape.arguments}


def test_a_run_of_the_former_default_keeps_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", {"question": "?", "answer": "!"})
    columns = ("data.conversation.prompt=question", "data.conversation.response=answer")
    before = config(path, "data=prompt_response", *columns)
    for typed in ((), columns, columns[:1]):
        found = config(path, *typed)
        settle_data(found)
        assert identity(plain(found)) == identity(plain(before))
    assert identity(plain(config())) == identity(plain(config("data=prompt_response")))  # no row has been read


def test_a_line_says_what_the_rows_are_taken_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "my.jsonl", {"messages": CHAT, "id": 1})
    settle_data(config(path))
    line = "my.jsonl: messages, 2 columns; not read: id (column 'messages' holds lists of role and content; "
    assert capsys.readouterr() == ("", f"{line}data=messages)\n")
    settle_data(config(path, "data=messages"))
    monkeypatch.setenv("RANK", "1")
    settle_data(config(path))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("data", ["data=auto", "data=text"])
def test_text_that_holds_a_chat_is_taken_with_a_hint(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "my.jsonl", {"text": "<|im_start|>user\nName a tree.<|im_end|>\n"})
    settle_data(config(path, data))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "note: my.jsonl: the text holds a chat (<|im_start|>), and every token of it is learned, the user's too: rows "
        "of messages (data=messages) would train the responses only"
    )


def test_a_run_that_exists_keeps_what_it_recorded(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", {"prompt": "?", "response": "!"})
    recorded = config(path, "data=prompt_response")
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    OmegaConf.save(recorded, tmp_path / "runs" / "mine" / "config.yaml", resolve=True)
    write(tmp_path / "my.jsonl", {"messages": CHAT})
    again = ("run=mine", f"runs_dir={tmp_path}/runs")
    resumed, other = config(path, *again), config(path, *again, "data.conversation.column=messages")
    settle_data(resumed)
    settle_data(other)
    assert plain(resumed)["data"] == plain(recorded)["data"]
    assert plain(other)["data"]["conversation"]["column"] == "messages"


def refused(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        settle_data(config(*overrides))
    return str(caught.value)


def test_columns_that_the_rows_lack_are_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "my.jsonl", {"question": "?", "answer": "!"})
    columns = "the columns are 'question', 'answer'"
    pair = "set data.conversation.prompt=question data.conversation.response=answer"
    assert refused(path, "data=prompt_response") == f"my.jsonl: no column 'prompt': {columns}: {pair}"
    assert refused(path, "data.conversation.prompt=questoin") == f"my.jsonl: no column 'questoin': {columns}: {pair}"
    assert refused(path, "data.conversation.system_column=sys").endswith(
        f"no column 'sys', which data.conversation.system_column names: {columns}"
    )
    val = tmp_path / "val.jsonl"
    write(val, {"prompt": "?", "response": "!"})
    assert refused(path, f"data.val_path={val}").startswith("val.jsonl: no column 'question': the columns are 'prompt'")


def test_sources_of_two_shapes_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", {"prompt": "?", "response": "!"})
    write(tmp_path / "b.jsonl", {"messages": CHAT})
    assert refused(f"data.path=[{tmp_path}/a.jsonl,{tmp_path}/b.jsonl]") == (
        "the sources have more than one shape: a.jsonl has data=prompt_response, and b.jsonl data=messages: give them "
        "one shape, or train on one of them"
    )


def test_missing_files_are_for_others_to_report_where_the_shape_is_given(tmp_path: Path) -> None:
    settle_data(config("data=messages", f"data.path={tmp_path}/none.jsonl"))
    settle_data(config())
    assert refused(f"data.path={tmp_path}/none.jsonl").startswith(f"{tmp_path}/none.jsonl: no such file or folder")
