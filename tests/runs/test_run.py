from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sft.config import CONF
from sft.errors import UserError
from sft.runs.identity import identity
from sft.runs.run import Run


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "name": "sft",
        "run": None,
        "runs_dir": "runs",
        "seed": 0,
        "model": {"path": "m", "attention": "packed"},
        "data": {"path": "d", "num_workers": 1, "conversation": {"prompt": "p"}},
        "trainer": {"precision": "32-true", "devices": 1},
        **changes,
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"runs_dir": "elsewhere"},
        {"model": {"path": "m", "attention": "sdpa"}},
        {"data": {"path": "d", "num_workers": 8, "conversation": {"prompt": "p"}}},
        {"trainer": {"precision": "32-true", "devices": 8}},
        {"micro_batch_size": 7},
        {"max_time": "1:00:00"},
        {"callbacks": {"timer": {"duration": "00:01:00:00"}}},
        {"logger": {"project": "x"}},
    ],
    ids=str,
)
def test_where_it_runs_is_not_in_the_name(changes: dict[str, Any]) -> None:
    assert identity(settings(**changes)) == identity(settings())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"model": {"path": "n", "attention": "packed"}},
        {"data": {"path": "d", "num_workers": 1, "conversation": {"prompt": "q"}}},
        {"trainer": {"precision": "bf16-true", "devices": 1}},
        {"global_batch_size": 7},
        {"parameters": {"freeze": ["*norm*"]}},
        {"parameters": {"groups": [{"match": "*norm*", "lr": 1.0}]}},
        {"trainer": {"precision": "32-true", "gradient_clip_algorithm": "value", "gradient_clip_val": 1.0}},
    ],
    ids=str,
)
def test_what_decides_the_numbers_is(changes: dict[str, Any]) -> None:
    assert identity(settings(**changes)) != identity(settings())


def test_without_clipping_there_is_one_name() -> None:
    trainer = settings()["trainer"]
    null, zero = trainer | {"gradient_clip_val": None}, trainer | {"gradient_clip_val": 0}
    for none in (zero, null | {"gradient_clip_algorithm": "value"}):
        assert identity(settings(trainer=none)) == identity(settings(trainer=null))


LATER = {
    "train_on": "all",
    "train_reasoning": True,
    "train_tool_calls": True,
    "special_text": None,
    "sample_by": "line",
}


def test_settings_that_came_later_name_no_run_anew(tmp_path: Path) -> None:
    begun = settings(run="run", runs_dir=str(tmp_path))
    with Run(tmp_path / "run").attempt(begun, {}, 9, main=True):
        pass
    for template in ({}, {"today": None}):
        now = settings(
            **{"run": "run", "runs_dir": str(tmp_path), "model": {**begun["model"], "template": template}},
            data={**begun["data"], **LATER},
        )
        assert identity(now) == identity(begun)
        assert Run.of(now).folder == tmp_path / "run"


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"path": "m", "template": {"today": None, "enable_thinking": False}}},
        {"model": {"path": "m", "template": {"today": "2026-01-31"}}},
        {"data": {"path": "d", "conversation": {"prompt": "p"}, "train_on": "last"}},
        {"data": {"path": "d", "conversation": {"prompt": "p"}, "special_text": "as_text"}},
    ],
    ids=str,
)
def test_settings_that_came_later_count_where_they_change_what_is_trained(changes: dict[str, Any]) -> None:
    assert identity(settings(**changes)) != identity(settings())


def test_a_run_keeps_the_day_that_its_chat_template_sees(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    assert run.day is None
    for day in ("2024-02-29", "2024-03-01"):  # resumed the next day
        with run.attempt(settings(), {}, 9, main=True, template={"today": day}):
            pass
        assert run.day == "2024-02-29"


def test_a_run_that_kept_no_day_was_begun_when_it_started(tmp_path: Path) -> None:
    run = Run(tmp_path)
    (tmp_path / "provenance.json").write_text('{"started": "2023-05-06T23:00:00+00:00"}')
    assert run.day == "2023-05-06"


def targets(model: str, schedule: str, rows: str) -> dict[str, Any]:
    data = {"path": "d", "conversation": {"_target_": rows, "_partial_": True}}
    return settings(model={"_target_": model, "path": "m"}, schedule={"_target_": schedule}, data=data)


BEGUN = targets("sft.model.loading.ModelSource", "sft.model.optimizer.linear", "sft.data.conversation.text")


def test_where_the_projects_code_lies_is_not_in_the_name(tmp_path: Path) -> None:
    moved = targets("sft.elsewhere.ModelSource", "sft.other.linear", "sft.shapes.text")
    assert identity(moved) == identity(BEGUN) == "8f8cbd2f"
    run = {"run": "run", "runs_dir": str(tmp_path)}
    with Run(tmp_path / "run").attempt(BEGUN | run, {}, 9, main=True):
        pass
    assert Run.of(moved | run).folder == tmp_path / "run"


@pytest.mark.parametrize(
    "other",
    [
        targets("sft.model.loading.ModelSource", "sft.model.optimizer.cosine", "sft.data.conversation.text"),
        targets("sft.model.loading.ModelSource", "sft.model.optimizer.linear", "sft.data.conversation.messages"),
        targets("sft.model.loading.ModelSource", "sft.model.optimizer.linear", "mine.text"),
        targets("mine.ModelSource", "sft.model.optimizer.linear", "sft.data.conversation.text"),
    ],
    ids=["schedule", "row function", "a user's row function", "a user's model"],
)
def test_which_code_it_is_decides(other: dict[str, Any]) -> None:
    assert identity(other) != identity(BEGUN)


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="exists and is not a run"):
        Run.of(settings(run="mine"))


def test_attempt_tells_how_it_went(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.attempt(settings(), {"train": "x"}, 9, main=True):
        assert run.status["state"] == "running"
    assert run.status["state"] == "finished"
    with pytest.raises(RuntimeError), run.attempt(settings(), {"train": "x"}, 9, main=True):
        raise RuntimeError("reason")
    assert (run.status["state"], run.status["error"]) == ("failed", "RuntimeError: reason")
    with pytest.raises(UserError, match="data has changed"), run.attempt(settings(), {"train": "y"}, 9, main=True):
        pass


def test_a_users_mistake_leaves_no_new_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with pytest.raises(UserError), run.attempt(settings(), {}, 9, main=True):
        raise UserError("mistake")
    assert not run.folder.exists()


def test_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    with Run(tmp_path / "one").attempt(settings(), {}, 9, main=True):
        pass
    assert Run.find("one", str(tmp_path)).folder == tmp_path / "one"
    assert Run.find(str(tmp_path / "one"), "elsewhere").folder == tmp_path / "one"
    with pytest.raises(UserError, match=r"there is no run two: .* holds one"):
        Run.find("two", str(tmp_path))


def test_folder_that_another_rank_is_making_is_no_strangers(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    mine = settings(run="run", runs_dir=str(tmp_path / "runs"))
    for made in ("logs", "events.jsonl", ".sft-trial", ".config.yaml.unfinished"):
        (folder / made).mkdir(parents=True)
        assert Run.of(mine).folder == folder
    (folder / "notes.txt").mkdir()
    with pytest.raises(UserError, match="exists and is not a run"):
        Run.of(mine)


@pytest.mark.parametrize(
    ("overrides", "digits"),
    [
        (["model.path=m", "data.path=d", "global_batch_size=16"], "6f5f9745"),
        (["experiment=gsm8k", "adapter=lora", "schedule=linear", "model.path=m"], "3e8898f0"),
        (
            [
                "data=messages",
                "schedule=warmup_stable_decay",
                "optimizer=sgd",
                "model.path=m",
                "data.path=d",
                "global_batch_size=16",
            ],
            "e9ab0592",
        ),
    ],
)
def test_runs_keep_the_names_that_they_were_begun_with(overrides: list[str], digits: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert identity(OmegaConf.to_container(compose("train", overrides), resolve=True)) == digits
