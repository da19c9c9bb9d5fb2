"""Whatever of a run is damaged is named, by every command that would take a number from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runfiles import final_files, rows
from running import Sft
from sft.runs import events, manifest, saved

SETTINGS = ("epochs=1", "checkpoint.save_every=1", "checkpoint.keep_last=9", "run=run")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data_file: Path) -> Path:
    """A folder with a run of 3 steps, each saved, and its export."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        sft = Sft(tmp_path_factory.mktemp("finished"), model_folder, data_file, monkeypatch)
        assert sft.train(*SETTINGS) == 0
    return sft.folder


@pytest.fixture
def run(sft: Sft, finished: Path) -> Path:
    """A copy of that run's folder."""
    shutil.copytree(finished / "runs", sft.folder / "runs")
    shutil.copytree(finished / "cache", sft.folder / "cache")
    return sft.run_folder()


def flip(path: Path) -> None:
    """One bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_by_a_line(path: Path) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def digit(path: Path) -> None:
    """Another learning rate, in a file that is as whole as before to whoever reads it."""
    text = path.read_text()
    assert '"lr": 0.' in text
    path.write_text(text.replace('"lr": 0.', '"lr": 1.', 1))


def another_digit(path: Path) -> None:
    """A number of an early row is another, and as good as before to whoever reads it."""
    lines = path.read_text().splitlines()
    assert lines[2].startswith("1,")
    lines[2] = lines[2].replace(".", ".9", 1)
    path.write_text("\n".join(lines) + "\n")


def scribble(path: Path) -> None:
    """A number of the last line is none any more."""
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].replace(".", ".x", 1)
    path.write_text("\n".join(lines) + "\n")


def unfinish(run: Path, step: int) -> None:
    """The run as it was after this step."""
    shutil.rmtree(run / "export")
    (run / "status.json").unlink()
    for later, folder in saved.folders(run / "checkpoints").items():
        if later > step:
            shutil.rmtree(folder)


def test_a_whole_run(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft("check", "run=run") == 0
    out = capsys.readouterr().out
    lines = {line.partition("  ")[0]: line for line in out.splitlines()}
    names = [
        "config.yaml",
        "provenance.json",
        "status.json",
        "data.json",
        "metrics.csv",
        "events.jsonl",
        "export",
        "model",
    ]
    steps = [f"checkpoints/step-0000000{step}" for step in (1, 2, 3)]
    for name in (*names, *steps, "export", "model", "data, train", "token store, train"):
        assert " whole " in lines[name], out
    assert "if lost: 1 step, 0 min of training" in lines[steps[2]]
    assert out.splitlines()[-1] == "runs/run: all 13 parts are whole"


DAMAGES = [
    ("config.yaml", flip),
    ("config.yaml", cut_by_a_line),
    ("provenance.json", flip),
    ("provenance.json", empty),
    ("status.json", cut),
    ("data.json", empty),
    ("metrics.csv", cut),
    ("metrics.csv", another_digit),
    ("events.jsonl", cut),
    ("checkpoints/step-00000002/shard-00000-of-00001.safetensors", flip),
    ("checkpoints/step-00000003/state.json", digit),
    ("checkpoints/step-00000003/probes.json", flip),
    ("checkpoints/step-00000001/callbacks.json", Path.unlink),
    ("checkpoints/step-00000001/manifest.json", flip),
    ("export/model.safetensors", flip),
    ("export/tokenizer.json", cut),
    ("export/verified.json", empty),
    ("export/manifest.json", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_damage_is_named(
    sft: Sft, run: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / name)
    assert sft("check", "run=run") == 1
    out = capsys.readouterr().out
    part = name.rpartition("/")[0] or name
    assert f"runs/run: not whole: {part}" in out.splitlines()[-1]
    line = next(line for line in out.splitlines() if line.startswith(f"{part} "))
    assert " DAMAGED " in line and name.rpartition("/")[2] in out


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", digit),
        ("state.json", empty),
        ("manifest.json", cut),
        ("callbacks.json", Path.unlink),
        ("shard-00000-of-00001.safetensors", cut),
        ("shard-00000-of-00001.safetensors", flip),  # which only a checksum shows
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_resumes_from_the_newest_checkpoint_that_is_whole(
    sft: Sft, run: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    files, metrics = final_files(run), rows(run)
    unfinish(run, 2)
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000001 (copy)")
    damage(run / "checkpoints" / "step-00000002" / name)
    assert sft.train(*SETTINGS) == 0
    printed = capsys.readouterr().out
    assert f"checkpoints/step-00000002/{name} is " in printed
    assert "resumes from" in printed and "the newest checkpoint that is whole" in printed
    assert final_files(run) == files and rows(run) == metrics
    assert (run / "checkpoints" / "damaged-step-00000002").exists()
    assert [event["event"] for event in events.read(run)].count("skipped") == 1


def test_where_no_checkpoint_is_whole(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unfinish(run, 2)
    for folder in saved.folders(run / "checkpoints").values():
        flip(folder / "shard-00000-of-00001.safetensors")
    for kind in (cut, cut):
        assert sft.train(*SETTINGS) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is damaged" in line and "no checkpoint is whole: put back a copy of one, or move runs/run away" in line
        for folder in saved.folders(run / "checkpoints").values():
            kind(folder / "shard-00000-of-00001.safetensors")
    assert len(saved.folders(run / "checkpoints")) == 2  # neither has been set aside


@pytest.mark.parametrize(
    ("command", "name"),
    [("generate", "model.safetensors"), ("score", "model.safetensors"), ("generate", "tokenizer.json")],
)
def test_a_damaged_export_answers_nothing(
    sft: Sft, run: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(run / "export" / name)
    assert sft(command, "run=run", *(["--prompt", "hi"] if command == "generate" else [])) == 2
    read = capsys.readouterr()
    (line,) = read.err.splitlines()
    assert not read.out
    assert f"export/{name} is damaged (its checksum is another): write it again with sft export run=run" in line


def test_the_model_card_is_its_users(sft: Sft, run: Path) -> None:
    (run / "export" / "README.md").write_text("# Mine\n")
    assert sft("generate", "run=run", "--prompt", "hi", "max_new_tokens=1") == 0


def test_a_damaged_checkpoint_is_not_exported(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints" / "step-00000003" / "shard-00000-of-00001.safetensors")
    assert sft("export", "run=run", "output=mine") == 2
    assert "shard-00000-of-00001.safetensors is damaged (its checksum is another): put back" in capsys.readouterr().err
    assert sft("export", "run=run", "checkpoint=2", "output=mine") == 0
    cut(run / "checkpoints" / "step-00000002" / "state.json")
    assert sft("export", "run=run", "checkpoint=2", "output=other") == 2
    assert "step-00000002/state.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.yaml", flip),
        ("config.yaml", cut_by_a_line),
        ("config.yaml", empty),
        ("config.yaml", Path.unlink),
        ("provenance.json", cut),
        ("provenance.json", Path.unlink),
        ("status.json", flip),
        ("status.json", empty),
        ("metrics.csv", cut),
        ("metrics.csv", scribble),
        ("metrics.csv", another_digit),
        ("metrics.csv", Path.unlink),
        ("events.jsonl", cut),
        ("data.json", empty),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_s_own_files(
    sft: Sft, run: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    """It resumes with the same numbers, or is refused by name."""
    files = final_files(run)
    unfinish(run, 2)
    manifest.write_sealed(run / "status.json", {"state": "interrupted"})
    damage(run / name)
    code = sft.train(*SETTINGS)
    printed = capsys.readouterr()
    refused = (name, damage) in [("provenance.json", cut), ("config.yaml", Path.unlink)]
    assert code == (2 if refused else 0), printed.err
    if refused:
        (line,) = printed.err.splitlines()
        assert str(run.name) in line and (name in line or "is not a run" in line)
    else:
        assert final_files(run) == files
        noted = [line for line in printed.out.splitlines() if line.startswith("note: ") and name in line]
        assert bool(noted) is (name in ("config.yaml", "status.json") or (name == "metrics.csv" and damage is not cut))


def test_the_configuration_of_a_finished_run_is_written_again(
    sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = (run / "config.yaml").read_text()
    flip(run / "config.yaml")
    assert sft.train(*SETTINGS) == 0
    printed = capsys.readouterr()
    assert "note: runs/run/config.yaml is damaged (its checksum is another): written again" in printed.out
    assert "is finished: nothing to do" in printed.out and not printed.err
    assert (run / "config.yaml").read_text() == written


def test_an_export_from_before_there_were_checksums(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "export" / manifest.NAME).unlink()
    assert sft("generate", "run=run", "--prompt", "hi", "max_new_tokens=1") == 2
    assert "export/manifest.json is missing: write it again with sft export run=run" in capsys.readouterr().err
    (run / "config.yaml").write_text((run / "config.yaml").read_text().partition("\n")[2])
    assert sft("generate", "run=run", "--prompt", "hi", "max_new_tokens=1") == 0
    note = "note: runs/run/export is from before there were checksums: it isn't compared"
    assert capsys.readouterr().err.splitlines().count(note) == 1


def test_a_run_from_before_there_were_checksums(sft: Sft, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = final_files(run)
    unfinish(run, 2)
    for folder in saved.folders(run / "checkpoints").values():
        (folder / manifest.NAME).unlink()
        state = json.loads((folder / "state.json").read_text())
        del state["checksum"]
        shards = {
            name: {"bytes": (folder / name).stat().st_size, "crc32": saved._crc32(folder / name)}
            for name in state["files"]
        }
        (folder / "state.json").write_text(json.dumps(state | {"format": 2, "files": shards}))
    recorded = json.loads((run / "provenance.json").read_text())
    before = {key: value for key, value in recorded.items() if key not in ("checksum", "identity")}
    (run / "provenance.json").write_text(json.dumps(before))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().partition("\n")[2])
    assert sft.train(*SETTINGS) == 0
    assert final_files(run) == files
    said = "is from before there were checksums of all files: only its shards are compared"
    assert capsys.readouterr().out.count(said) == 1
