"""What is the same computation, and how another is said."""

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from sft.errors import UserError
from sft.runs import computation, events
from sft.runs.computation import changes, check, history, note, said, taken
from sft.runs.events import Computation, Event


def made(torch: str = "2.12.0", **parts: dict[str, str]) -> Computation:
    return {"files": {"mask": {"data/mask.py": "1"}, "other": {"ranks.py": "1"}, **parts}, "versions": {"torch": torch}}


OWN = {"own data.conversation": {"my_rows.py": "1"}, "own callbacks.a": {"mine.py": "1"}}


@pytest.mark.parametrize(
    ("after", "line", "refused"),
    [
        (made(), "", False),
        (made(mask={"data/mask.py": "2"}), "data/mask.py changed", True),
        (made(other={"ranks.py": "2"}, torch="2.13.0"), "ranks.py changed; torch 2.12.0 → 2.13.0", False),
        (made(mask={"data/mask.py": "2", "data/x.py": "1"}), "data/mask.py changed; data/x.py is new", True),
        (made(other={"ranks.py": "2"}, mask={}), "data/mask.py is gone; ranks.py changed", True),
        ({**made(), "versions": {}}, "torch 2.12.0 → none", False),
        (made(**{"own optimizer": {"mine.py": "1"}}), "", False),  # another setting: for the run's name to say
        (made(imported={"helper.py": "1"}), "", False),
    ],
)
def test_changes(after: Computation, line: str, refused: bool) -> None:
    found = changes(made(), after)
    assert said(found) == line
    assert any(change.refused for change in found) is refused


@pytest.mark.parametrize(
    ("setting", "refused"),
    [
        *((name, True) for name in ("data.conversation", "optimizer", "schedule", "averaging", "model")),
        *((name, False) for name in ("callbacks.a", "evaluation.scorer", "logger.b")),
    ],
)
def test_own_functions_that_decide_the_numbers(setting: str, refused: bool) -> None:
    part = f"own {setting}"
    (change,) = changes(made(**{part: {"mine.py": "1"}}), made(**{part: {"mine.py": "2"}}))
    assert (change.said, change.refused) == ("mine.py changed", refused)


def test_many_changes_are_one_short_line() -> None:
    before = made(other={f"model/{number}.py": "1" for number in range(9)})
    after = made(other={f"model/{number}.py": "2" for number in range(9)})
    assert said(changes(before, after)).endswith("model/5.py changed; 3 more")


def test_every_file_of_the_package_is_of_one_part() -> None:
    found = computation.now({})["files"]
    assert "data/mask.py" in found["mask"]
    assert "data/rendering.py" in found["template"]
    assert "model/loss.py" in found["loss"]
    assert {"data/rows.py", "data/step_plan.py", "data/packing.py"} <= found["data"].keys()
    assert {"model/attention.py", "training/fit.py", "checkpoint/save.py"} <= found["other"].keys()
    names = [name for part in computation.PARTS for name in found[part]]
    assert len(names) == len(set(names))
    patterns = [pattern for part in computation.PARTS.values() for pattern in part]
    assert all(list(computation.PACKAGE.glob(pattern)) for pattern in patterns)  # none names a file of the past


def start(step: int, name: str, **more: object) -> Event:
    return {"event": "start", "step": step, "commit": name, **more}  # type: ignore[typeddict-item,return-value]


def test_a_start_that_left_no_checkpoint_took_no_part() -> None:
    story = [start(0, "a"), start(4, "b"), start(4, "c"), {"event": "save", "step": 8}, start(8, "d"), start(4, "e")]
    assert [event["commit"] for event in taken(story)] == ["a", "e"]  # type: ignore[arg-type]
    assert [event["commit"] for event in taken(story[:5], 8)] == ["a", "c"]  # type: ignore[arg-type]
    assert [event["commit"] for event in taken(story[:5], 4)] == ["a"]  # type: ignore[arg-type]
    assert taken(story, 0) == []  # type: ignore[arg-type]


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[Computation]:
    """What this process computes: the last of these."""
    chosen = [made()]
    monkeypatch.setattr(computation, "now", lambda config: chosen[-1])
    monkeypatch.setattr(computation, "_untracked", lambda found: {})
    return chosen


def begin(folder: Path, step: int, *allow: str) -> dict[str, object]:
    details = computation.at_start(folder, {}, allow, step)
    events.record(folder, "start", step=step, **details)
    return details


def test_a_run_of_many_starts(tmp_path: Path, current: list[Computation]) -> None:
    assert begin(tmp_path, 0)["code"] == made()
    assert begin(tmp_path, 2).keys() == {"commit", "computation"}  # the same: its hash is enough
    assert check(tmp_path, {}, (), 4) is None

    current.append(made("2.13.0"))
    assert check(tmp_path, {}, (), 4) == "since step 4: torch 2.12.0 → 2.13.0"
    details = begin(tmp_path, 4)
    assert (details["changed"], details["code"]) == ("torch 2.12.0 → 2.13.0", made("2.13.0"))
    assert "allowed" not in details

    current.append(made("2.13.0", mask={"data/mask.py": "2"}))
    with pytest.raises(UserError, match=r"would change after step 6: data/mask\.py changed: put back .*allow=\[code\]"):
        check(tmp_path, {}, (), 6)
    assert check(tmp_path, {}, ("code",), 6) == "since step 6: data/mask.py changed"
    assert begin(tmp_path, 6, "code")["allowed"] == ["code"]

    current.append(made("2.13.0"))  # put back before a step of it was saved
    assert check(tmp_path, {}, (), 6) is None
    current.pop()
    assert check(tmp_path, {}, (), 8) is None
    assert history(tmp_path, 8)["changed"] == "since step 4: torch 2.12.0 → 2.13.0; since step 6: data/mask.py changed"
    assert "changed" not in history(tmp_path, 4)  # of an earlier step's weights
    assert note(tmp_path, {}) is None
    current.append(made("2.13.0"))
    assert str(note(tmp_path, {})).startswith("note: data/mask.py changed since ")
    current.append(made("2.14.0", mask={"data/mask.py": "2"}))
    assert note(tmp_path, {}) is None  # no prompt gets other tokens


@pytest.mark.parametrize("file", ["data/mask.py", "data/rendering.py", "model/loss.py", "data/step_plan.py"])
def test_an_edit_of_the_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    shutil.copytree(computation.PACKAGE, tmp_path / "sft")
    monkeypatch.setattr(computation, "PACKAGE", tmp_path / "sft")
    begin(tmp_path, 0)
    assert check(tmp_path, {}, (), 4) is None
    with (tmp_path / "sft" / file).open("a") as code:
        code.write("\n")
    with pytest.raises(UserError, match=f"would change after step 4: {file} changed: "):
        check(tmp_path, {}, (), 4)
    assert check(tmp_path, {}, ["code"], 4) == f"since step 4: {file} changed"


def test_a_run_begun_before_there_was_a_fingerprint(tmp_path: Path, current: list[Computation]) -> None:
    events.record(tmp_path, "start", step=0)
    assert "has no record of the code and versions" in str(check(tmp_path, {}, (), 4))
    assert "changed" not in begin(tmp_path, 4)
    assert check(tmp_path, {}, (), 8) is None
    assert note(tmp_path, {}) is None


def test_a_run_whose_story_is_gone(tmp_path: Path, current: list[Computation]) -> None:
    assert "has no record of the code and versions" in str(check(tmp_path, {}, (), 4))
    assert note(tmp_path, {}) is None
    assert history(tmp_path, 4) == {}


def test_the_commits_and_the_attention_that_took_part(tmp_path: Path) -> None:
    events.record(tmp_path, "start", step=0, commit="a")
    events.record(tmp_path, "start", step=4, commit="b", untracked={"mine.py": "f00"})
    events.record(tmp_path, "first_batch", step=4, attention="eager", changed="samples run apart, no longer packed")
    assert history(tmp_path, 4) == {}
    assert history(tmp_path, 5) == {
        "commits": "a, b",
        "changed": "since step 4: samples run apart, no longer packed",
        "code in no commit": "mine.py (f00)",
    }


def project(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/', 1)}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    importlib.invalidate_caches()


def test_a_users_function_and_all_that_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant of another file, a module in a function, a package's sibling; no library, and nothing of this one."""
    monkeypatch.syspath_prepend(tmp_path)
    project(
        tmp_path,
        one_row="import json, torch\nfrom one_word import word\nfrom sft.errors import UserError\n"
        "def row(row):\n    import one_late\n    from one_pack.inner import x\n    return None\n",
        one_word="import one_row\nword = ''\n",
        one_late="",
        one_pack__inner="from . import sibling\nfrom .sibling import y\nx = 1\n",
        one_pack__sibling="y = 1\n",
        one_other="",
    )
    config = {"data": {"conversation": {"_target_": "one_row.row"}}, "optimizer": {"_target_": "torch.optim.SGD"}}
    before = computation.now(config)
    assert before["files"]["own data.conversation"].keys() == {
        *("one_row.py", "one_word.py", "one_late.py", "one_pack/inner.py", "one_pack/sibling.py")
    }
    assert "own optimizer" not in before["files"]
    project(tmp_path, one_pack__sibling="y = 2\n", one_other="x = 1")
    (change,) = changes(before, computation.now(config))
    assert (change.said, change.refused) == ("one_pack/sibling.py changed", True)


def test_code_that_no_commit_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    project(tmp_path, two_known="", two_new="import two_known\n")
    importlib.import_module("two_new")
    computed = computation.now({"callbacks": {"a": {"_target_": "two_new.A"}}})
    assert "two_new.py" not in computation._untracked(computed)  # no checkout: no commit lacks it
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "two_known.py"], cwd=tmp_path, check=True)
    hidden = computation._untracked(computed)
    assert hidden["two_new.py"] == computed["files"]["own callbacks.a"]["two_new.py"]
    assert "two_known.py" not in hidden
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert computation._untracked(computed) == {}
    assert len(json.dumps(computed)) < 20_000
