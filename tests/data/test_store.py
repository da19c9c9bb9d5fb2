"""The token store: built once, whole or not at all, the same whoever builds it; and the ledger of what was
lost."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.data import build as build_module
from sft.data import dataset as dataset_module
from sft.data import ledger
from sft.data import staging as staging_module
from sft.data.conversation import messages, prompt_response
from sft.data.files import short_names
from sft.data.labels import IGNORE, Sample
from sft.data.mask import Tokenized
from sft.data.rows import Source
from sft.data.samples import Samples, columns_of
from sft.data.staging import Staging
from sft.data.store import DTYPES, Store
from sft.errors import UserError
from sft.runs import manifest

from .conftest import data_config, word_tokenizer

PLAIN = partial(prompt_response, chat=False)
_ = IGNORE


def rows_file(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(path, (time.time() - 100, time.time() - 100))
    return path


@pytest.fixture(autouse=True)
def workers_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a test asks for workers it is to have them, whatever they are worth."""
    monkeypatch.setattr(build_module, "NUM_ROWS_WORTH_WORKERS", 1000)


def many_rows(num_rows: int) -> list[dict[str, str]]:
    """Of different lengths; each 50th without a response."""
    return [
        {"prompt": "hi " * (i % 7) + "why", "response": "" if i % 50 == 49 else "yes " * (i % 5) + "so"}
        for i in range(num_rows)
    ]


def open_store(
    *paths: Path, cache: Path, wait: bool = False, log: Callable[[str], None] = lambda line: None, **changes: Any
) -> Store:
    defaults = {"conversation": PLAIN, "num_workers": 1, "max_lost": 1.0, "max_length": 100, "cache_dir": str(cache)}
    config = data_config(**defaults | changes)
    return config.store([Source(str(path)) for path in paths], word_tokenizer(), wait=wait, log=log)


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "stores").iterdir())


def test_samples_come_back_as_they_were_made(tmp_path: Path) -> None:
    first = rows_file(tmp_path / "a.jsonl", [{"prompt": "hi", "response": "yes"}, {"prompt": "hi", "response": None}])
    second = rows_file(
        tmp_path / "b.jsonl", [{"prompt": "", "response": "x"}, {"prompt": "why so", "response": "good"}]
    )
    store = open_store(first, second, cache=tmp_path / "cache")
    assert len(store) == 2
    input_ids, labels = store[0]
    assert (input_ids.tolist(), labels.tolist()) == ([11, 12, 2], [_, 12, 2])
    input_ids, labels = store[1]
    assert (input_ids.tolist(), labels.tolist()) == ([13, 10, 14, 16, 2], [_, _, _, 16, 2])
    assert input_ids.dtype == labels.dtype == store.lengths.dtype == store.num_supervised.dtype == np.int32
    assert store.lengths.tolist() == [3, 5]
    assert store.num_supervised.tolist() == [2, 2]
    assert [(store.source(i), store.row(i)) for i in range(2)] == [("a.jsonl", 0), ("b.jsonl", 1)]
    assert store.content.dtype == np.uint64
    assert store.content[0] != store.content[1]
    with pytest.raises(IndexError):
        store[2]
    second_alone = store.subset(np.array([1]))
    assert len(second_alone) == 1
    assert second_alone[0][0].tolist() == input_ids.tolist()
    assert (second_alone.source(0), second_alone.row(0)) == ("b.jsonl", 1)
    assert (second_alone.lengths.tolist(), second_alone.num_supervised.tolist()) == ([5], [2])


def test_equal_rows_have_equal_content(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "response": "yes"}, {"prompt": "hi", "response": "so"}] * 2
    store = open_store(rows_file(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache")
    assert store.content[0] == store.content[2] != store.content[1] == store.content[3]


def test_the_ledger_counts_every_row_by_reason(tmp_path: Path) -> None:
    def said(*turns: tuple[str, str | None]) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    rows = [
        said(("user", "hi"), ("assistant", "yes")),
        said(("user", "hi")),
        said(("user", "hi"), ("assistant", None)),
        said(("assistant", "hi")),
        said(("user", "hi hi hi hi hi"), ("assistant", "yes")),
        said(("user", "hi"), ("assistant", "yes yes yes yes yes yes yes yes")),
        *[said(("user", "hi"))] * 6,
    ]

    def lines(*rows: int) -> list[dict[str, object]]:
        return [{"row": row, "place": f"a.jsonl line {row + 1}", "why": ""} for row in rows]

    file = rows_file(tmp_path / "a.jsonl", rows)
    cut = {"max_length": 12, "overlong": "truncate_prompt"}
    store = open_store(file, cache=tmp_path / "cache", conversation=messages, **cut)
    assert store.counts == [
        {
            "source": "a.jsonl",
            "rows": 12,
            "samples": 2,
            "tokens": 7 + 12,
            "supervised_tokens": 2 + 2,
            "rows_lost": 10,
            "lost": {"no_assistant_turn": 7, "empty_response": 1, "empty_prompt": 1, "overlong": 1},
            "truncated_prompt": 1,
            "examples": {
                "no_assistant_turn": lines(1, 6, 7, 8, 9),
                "empty_response": lines(2),
                "empty_prompt": lines(3),
                "truncated_prompt": lines(4),
                "overlong": [{**lines(5)[0], "why": "a sample of 21 tokens, and data.max_length=12"}],
            },
            "unread": {"columns": {}, "message_keys": {}},
            "stops": store.counts[0]["stops"],
        }
    ]


def test_too_many_lost_rows_are_refused_at_build_and_at_open(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "response": "yes"}] * 8 + [{"prompt": "hi", "response": "yes " * 200}] * 2
    file = rows_file(tmp_path / "a.jsonl", rows)
    message = (
        r"^2 of 10 rows lost, more than data\.max_lost=0\.1 of them: 2 overlong \(a\.jsonl line 9, a\.jsonl line 10.*\)"
        r": raise data\.max_length or set data\.overlong=truncate_prompt; correct these rows or raise data\.max_lost$"
    )
    for _attempt in ("build", "open"):
        with pytest.raises(UserError, match=message):
            open_store(file, cache=tmp_path / "cache", max_lost=0.1)
    assert len(open_store(file, cache=tmp_path / "cache", max_lost=0.2)) == 8


def test_overlong_rows_are_an_error_where_they_are_to_be_one(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "response": "yes"}] * 98 + [{"prompt": "hi", "response": "yes " * 200}]
    file = rows_file(tmp_path / "a.jsonl", rows)
    message = (
        r"^data\.overlong=error: 1 overlong \(a\.jsonl line 99: a sample of 40\d tokens, and data\.max_length=100\)"
    )
    for _attempt in ("build", "open"):
        with pytest.raises(UserError, match=message):
            open_store(file, cache=tmp_path / "cache", overlong="error")


def test_cut_prompts_are_not_lost(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"prompt": "hi " * 50, "response": "yes"}])
    cut = {"max_length": 10, "overlong": "truncate_prompt"}
    assert len(open_store(file, cache=tmp_path / "cache", max_lost=0.0, **cut)) == 1


def test_nothing_to_train_on(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"prompt": "hi", "response": " "}] * 3)
    with pytest.raises(UserError, match=r"^3 of 3 rows lost, which leaves nothing to train on: 3 empty_response"):
        open_store(file, cache=tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_one_bad_row_ends_nothing_whoever_reads_it(tmp_path: Path) -> None:
    rows = many_rows(2500)
    for number, num_workers in ((17, 1), (2300, 2)):
        bad = [{**row, "response": {"a": 1}} if i == number else row for i, row in enumerate(rows)]
        file = rows_file(tmp_path / f"{number}.jsonl", bad)
        store = open_store(file, cache=tmp_path / "cache", num_workers=num_workers)
        assert len(store) == 2449
        assert store.counts[0]["lost"] == {"empty_response": 50, "not_a_text": 1}
        why = "column 'response' holds {'a': 1} (dict), not a string"
        place = f"{number}.jsonl line {number + 1}"
        assert store.counts[0]["examples"]["not_a_text"] == [{"row": number, "place": place, "why": why}]


def test_whatever_is_wrong_with_a_line_is_counted_by_reason_and_place(tmp_path: Path) -> None:
    good = b'{"prompt": "hi", "response": "yes"}\n'
    lines = [good, b"\n", b'{"prompt": "hi"', good, b"[1]\n", b'{"prompt": "\xe9"}\n', b'{"prompt": "\\ud800"}\n', good]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(lines[:2]) + b'{"prompt": "hi"\n' + b"".join(lines[3:]))
    counts = open_store(file, cache=tmp_path / "cache").counts[0]
    assert (counts["rows"], counts["samples"], counts["rows_lost"]) == (7, 3, 4)
    assert {reason: [(each["row"], each["place"]) for each in of] for reason, of in counts["examples"].items()} == {
        "broken_json": [(1, "a.jsonl line 3")],
        "not_an_object": [(3, "a.jsonl line 5")],
        "not_utf8": [(4, "a.jsonl line 6"), (5, "a.jsonl line 7")],
    }
    message = (
        r"^4 of 7 rows lost, more than data\.max_lost=0\.5 of them: 2 not_utf8 \(a\.jsonl line 6, a\.jsonl line 7: "
        r"byte 0xe9 is not UTF-8\): save the file as UTF-8; 1 broken_json \(a\.jsonl line 3: broken JSON.*\): correct "
        r"or remove the lines; 1 not_an_object \(.*\): .*; correct these rows or raise data\.max_lost$"
    )
    with pytest.raises(UserError, match=message):
        open_store(file, cache=tmp_path / "cache", max_lost=0.5)


def test_a_fault_in_all_of_the_first_rows_is_one_of_the_settings(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", [{"prompt": "hi"}] * 1000 + many_rows(2000))
    with pytest.raises(
        UserError, match=r"^all of the first 1,000 rows are lost: 1,000 no_column \(a\.jsonl line 1, .*: no"
    ):
        open_store(file, cache=tmp_path / "cache", max_lost=0.9)
    assert folders(tmp_path / "cache") == []
    longest_first = [{"prompt": "hi", "response": "yes " * 200}] * 1000 + many_rows(2000)
    file = rows_file(tmp_path / "b.jsonl", longest_first)
    assert len(open_store(file, cache=tmp_path / "cache", max_lost=0.9)) == 1960


def test_what_nobody_reads_is_named_once_with_the_number_of_rows_that_have_it(tmp_path: Path) -> None:
    rows = [{"id": 1, "prompt": "hi", "response": "yes", "source": "x"}, {"prompt": "hi", "response": "so", "id": None}]
    store = open_store(rows_file(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache")
    assert store.counts[0]["unread"] == {"columns": {"id": 2, "source": 1}, "message_keys": {}}
    assert ledger.not_read({"train": {"sources": store.counts}}) == "not read: columns id, source"


def reads_all(row: Any) -> Any:
    return PLAIN({**row})


def test_a_function_that_copies_its_row_reads_all_of_it(tmp_path: Path) -> None:
    rows = [{"id": 1, "prompt": "hi", "response": "yes"}]
    store = open_store(rows_file(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", conversation=reads_all)
    assert store.counts[0]["unread"]["columns"] == {}


def broken_function(row: Any) -> Any:
    return row["nothing"] if row["prompt"] == "hi" else PLAIN(row)


def test_a_bug_in_a_row_function_is_counted_with_its_line(tmp_path: Path) -> None:
    rows = [{"prompt": "hi", "response": "yes"}, {"prompt": "why", "response": "so"}]
    store = open_store(rows_file(tmp_path / "a.jsonl", rows), cache=tmp_path / "cache", conversation=broken_function)
    [example] = store.counts[0]["examples"]["row_function_failed"]
    assert re.fullmatch(r"KeyError: 'nothing' \(test_store\.py, line \d+\)", example["why"])
    assert len(store) == 1


def test_the_number_of_workers_changes_not_one_byte(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(3500))
    stores = [open_store(file, cache=tmp_path / f"cache{n}", num_workers=n).fingerprint for n in (1, 2)]
    assert stores[0] == stores[1]
    one, two = (tmp_path / f"cache{n}" / "stores" / stores[0] for n in (1, 2))
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in two.iterdir())
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes(), path.name


def test_a_store_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(10))
    first = open_store(file, cache=tmp_path / "cache")
    monkeypatch.setattr(dataset_module, "build_store", None)  # would raise
    again = open_store(file, cache=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert again.data_fingerprint == first.data_fingerprint
    moved = rows_file(tmp_path / "cache" / "a.jsonl", many_rows(10))
    assert open_store(moved, cache=tmp_path / "cache").fingerprint == first.fingerprint


def damage(path: Path, how: str) -> None:
    """Without a change that a look at its size or time would show, for `flip`."""
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": content, "truncate": content[:-1], "garbage": b"\xff" * len(content)}[how])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("how", ["flip", "truncate", "garbage"])
@pytest.mark.parametrize("name", ["input_ids.bin", "supervised.bin", "rows.bin", "content.bin", "meta.json"])
def test_a_damaged_store_is_named(name: str, how: str, tmp_path: Path) -> None:
    file = rows_file(tmp_path / "data.jsonl", many_rows(20))
    store = open_store(file, cache=tmp_path / "cache")
    before = [store[i][0].tolist() for i in range(len(store))]
    folder = tmp_path / "cache" / "stores" / store.fingerprint
    damage(folder / name, how)
    with pytest.raises(UserError, match=rf"{name} is damaged .*: remove the folder .*{folder.name}"):
        open_store(file, cache=tmp_path / "cache")
    shutil.rmtree(folder)
    again = open_store(file, cache=tmp_path / "cache")
    assert [again[i][0].tolist() for i in range(len(again))] == before


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "data.jsonl", many_rows(20))
    folder = tmp_path / "cache" / "stores" / open_store(file, cache=tmp_path / "cache").fingerprint
    text = (folder / "manifest.json").read_text()
    for damaged in (text.replace("1", "2", 1), text[:-5], "", "[]", text.replace('"files"', '"fules"')):
        (folder / "manifest.json").write_text(damaged)
        with pytest.raises(UserError, match=r"manifest.json is (damaged|empty)"):
            open_store(file, cache=tmp_path / "cache")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest.json is missing: remove the folder"):
        open_store(file, cache=tmp_path / "cache")


def test_a_store_is_compared_once_while_it_is_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows_file(tmp_path / "data.jsonl", many_rows(20))
    folder = tmp_path / "cache" / "stores" / open_store(file, cache=tmp_path / "cache").fingerprint
    monkeypatch.setattr("sft.data.fingerprint.RACY_SECONDS", -1.0)
    read: list[Path] = []
    compare = manifest.entry
    monkeypatch.setattr(manifest, "entry", lambda path: [read.append(path), compare(path)][1])
    for _ in range(2):
        open_store(file, cache=tmp_path / "cache")
        assert {path.name for path in read} >= {"input_ids.bin", "meta.json"}
        again = [path for path in read if path.name != "meta.json"]  # which is small
        assert len(again) == len({*again})
    damage(folder / "input_ids.bin", "flip")  # its size and time of modification are as they were
    with pytest.raises(UserError, match=r"input_ids\.bin is damaged"):
        open_store(file, cache=tmp_path / "cache")


def test_opening_reads_no_tokens(tmp_path: Path) -> None:
    """A store of 4 GB of tokens (holes in a file) opens at once and takes no memory."""
    folder = tmp_path / "store"
    folder.mkdir()
    num_samples, length = 1_000_000, 1000
    for name, dtype in DTYPES.items():
        num_values = num_samples * (length if name in ("input_ids", "supervised") else 1) + (name == "offsets")
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(num_values * np.dtype(dtype).itemsize)
    counts = {"samples": num_samples, "tokens": num_samples * length}
    (folder / "meta.json").write_text(json.dumps({"data_fingerprint": "", "sources": [counts]}))
    files: manifest.Manifest = {
        file.name: {"bytes": file.stat().st_size, "xxh3_128": "of 4 GB"} for file in folder.glob("*.bin")
    }
    manifest.write(folder, files | manifest.entries(folder, ["meta.json"]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    store = Store(folder, [Source("a.jsonl")])
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before  # 2 MiB at most; the tokens have 2000
    assert pages < 500
    assert len(store) == num_samples
    assert isinstance(store.lengths.base, np.memmap)


def builder(file: Path, cache: Path, num_workers: int, seconds_per_row: float) -> subprocess.Popen[str]:
    """A process that says "ready", waits for a line, builds the store and says its key."""
    program = Path(__file__).with_name("build_a_store.py")
    return subprocess.Popen(
        [sys.executable, str(program), str(file), str(cache), str(num_workers), str(seconds_per_row)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def wait_for_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_of_processes_that_build_the_same_store_one_wins_and_all_open_it(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(20))
    processes = [builder(file, tmp_path / "cache", 1, 0.02) for _process in range(4)]
    for process in processes:
        wait_for_ready(process)
    for process in processes:
        start(process)
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert folders(tmp_path / "cache") == [said[0].strip()]
    assert len(set(said)) == 1


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker processes in /proc")
def test_after_a_kill_the_store_is_not_there_its_workers_end_and_the_next_build_cleans_up(
    tmp_path: Path,
) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(2000))
    cache = tmp_path / "cache"
    with builder(file, cache, 2, 1.0) as process:
        wait_for_ready(process)
        start(process)
        wait_until(lambda: list((cache / "stores").glob(".building-*/store/*.bin")))
        wait_until(lambda: len(children_of(process.pid)) >= 2)
        workers = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
    assert [name.startswith(".building-") for name in folders(cache)] == [True]
    wait_until(lambda: not any(map(is_running, workers)))

    with builder(file, cache, 1, 0.0) as process:
        wait_for_ready(process)
        start(process)
        key = process.communicate(timeout=60)[0].strip()
    assert folders(cache) == [key]
    assert len(Store(cache / "stores" / key, [Source(str(file))])) == 1960


def test_a_killed_build_is_continued_and_changes_not_one_byte(tmp_path: Path) -> None:
    file, cache = rows_file(tmp_path / "a.jsonl", many_rows(2000)), tmp_path / "cache"
    with builder(file, cache, 1, 0.002) as process:
        wait_for_ready(process)
        start(process)
        wait_until(lambda: any(num_pieces(path) >= 2 for path in (cache / "stores").glob(".building-*")))
        process.send_signal(signal.SIGKILL)
    lines: list[str] = []
    [left] = (cache / "stores").iterdir()
    num_rows = 250 * num_pieces(left)
    with (left / "store/input_ids.bin").open("ab") as written_after_the_progress:
        written_after_the_progress.write(b"half a sample")
    with builder(file, cache, 1, 0.0) as process:
        wait_for_ready(process)
        start(process)
        key, said = (text.strip() for text in process.communicate(timeout=60))
    lines = said.splitlines()
    assert lines[0] == f"token store: continued after {num_rows:,} rows"
    assert lines[-1].startswith("token store: 2,000 rows, 1,960 samples, ")
    assert folders(cache) == [key]
    with builder(file, tmp_path / "other", 1, 0.0) as process:
        wait_for_ready(process)
        start(process)
        assert process.communicate(timeout=60)[0].strip() == key
    for path in (cache / "stores" / key).iterdir():
        assert path.read_bytes() == (tmp_path / "other/stores" / key / path.name).read_bytes(), path.name


def num_pieces(folder: Path) -> int:
    progress = folder / "progress.json"
    return int(json.loads(progress.read_text())["num_pieces"]) if progress.exists() else 0


def test_a_build_that_died_on_another_machine_is_continued_from_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, cache = rows_file(tmp_path / "a.jsonl", many_rows(1000)), tmp_path / "cache"
    key = open_store(file, cache=tmp_path / "elsewhere").fingerprint

    class Killed(BaseException):
        pass

    monkeypatch.setattr(staging_module, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(staging_module.socket, "gethostname", lambda: "other-1")
    calls = []

    def save(staging: Any) -> None:
        real(staging)
        calls.append(staging)
        if len(calls) == 2:
            raise Killed

    real = staging_module.Staging.save
    monkeypatch.setattr(staging_module.Staging, "save", save)
    with pytest.raises(Killed):
        open_store(file, cache=cache)
    monkeypatch.undo()
    [theirs] = (cache / "stores").iterdir()
    lines: list[str] = []
    open_store(file, cache=tmp_path / "cache", log=lines.append)
    assert len(lines) == 1  # it may be alive
    shutil.rmtree(cache / "stores" / key)
    os.utime(theirs / "progress.json", (time.time() - 1000,) * 2)
    open_store(file, cache=cache, log=lines.append)
    assert lines[1] == "token store: continued after 500 rows"
    assert folders(cache) == sorted([theirs.name, key])
    for path in (cache / "stores" / key).iterdir():
        assert path.read_bytes() == (tmp_path / "elsewhere/stores" / key / path.name).read_bytes(), path.name


def test_what_may_belong_to_another_is_left_alone(tmp_path: Path) -> None:
    """The staging folders of a process that lives, of another machine, and of another store."""
    file = rows_file(tmp_path / "a.jsonl", many_rows(3))
    key = open_store(file, cache=tmp_path / "elsewhere").fingerprint
    host = socket.gethostname()
    dead = subprocess.Popen(["true"])
    dead.wait()
    theirs = [
        f".building-{key}-{host}-{os.getppid()}-0123abcd",
        f".building-{key}-not{host}-{dead.pid}-0123abcd",
        f".building-{key}-{host}-other-{dead.pid}-0123abcd",
        f".building-{key[::-1]}-{host}-{dead.pid}-0123abcd",
    ]
    for name in (*theirs, f".building-{key}-{host}-{dead.pid}-0123abcd"):
        (tmp_path / "cache" / "stores" / name).mkdir(parents=True)
    open_store(file, cache=tmp_path / "cache")
    assert folders(tmp_path / "cache") == sorted([*theirs, key])


def killed(row: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(2000))
    with pytest.raises(UserError, match=r"was killed, most likely for lack of memory: lower data\.num_workers$"):
        open_store(file, cache=tmp_path / "cache", num_workers=2, conversation=killed)
    assert folders(tmp_path / "cache") == []


def signalled(row: Any) -> Any:
    os.kill(os.getpid(), signal.SIGUSR1)
    return PLAIN(row)


def test_a_worker_does_not_die_of_the_signal_to_a_job(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(2000))
    assert len(open_store(file, cache=tmp_path / "cache", num_workers=2, conversation=signalled)) == 1960


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(staging_module, "fsync", full)
    file = rows_file(tmp_path / "a.jsonl", many_rows(3))
    with pytest.raises(UserError, match=r"cache: the token store cannot be written \(No space left on device\): make"):
        open_store(file, cache=tmp_path / "cache")
    assert folders(tmp_path / "cache") == []


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(3))
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cache: the token store cannot be written .* set data\.cache_dir to another"):
        open_store(file, cache=tmp_path / "cache")


def test_weights_are_written_once_a_sample_has_some(tmp_path: Path) -> None:
    def samples(labels: list[int], weights: list[float] | None) -> Samples:
        return columns_of(0, [Tokenized([Sample([5] * len(labels), labels, weights)], {})])

    with Staging(tmp_path / "stores" / "key") as staging:
        staging.write(samples([_, 5, 5], None))
        assert not (staging.store / "weights.bin").exists()
        staging.write(samples([_, 5, _, 5], [9.0, 0.5, 9.0, 2.0]))
        staging.write(samples([_, 5], None))
        staging.publish({})
    weights = np.fromfile(tmp_path / "stores/key/weights.bin", np.float32)
    assert weights.tolist() == [0, 1, 1, 0, 0.5, 0, 2, 0, 1]


class Clock:
    """Time that passes by `step` seconds with every look at it."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def monotonic(self) -> float:
        self.now += self.step
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_long_build_tells_of_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "time", Clock(1.5))
    lines: list[str] = []
    open_store(rows_file(tmp_path / "a.jsonl", many_rows(400)), cache=tmp_path / "cache", log=lines.append)
    assert lines == ["token store: 400 rows, 100%, 3 s", "token store: 400 rows, 392 samples, 4.5 s"]


def test_other_ranks_wait_for_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows_file(tmp_path / "a.jsonl", many_rows(3))
    cache = tmp_path / "cache"
    lines: list[str] = []

    class BuildsMeanwhile(Clock):
        def sleep(self, seconds: float) -> None:
            if len(lines) == 2:
                open_store(file, cache=cache)

    monkeypatch.setattr(dataset_module, "time", BuildsMeanwhile(10.0))
    assert len(open_store(file, cache=cache, wait=True, log=lines.append)) == 3
    assert lines == [f"waiting {seconds} s for the token store that rank 0 builds" for seconds in (40, 70)]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([Source("data/maths.jsonl"), Source("data/code.csv.gz")], ["maths", "code"]),
        ([Source("maths/test.jsonl"), Source("code/test.jsonl")], ["maths/test", "code/test"]),
        ([Source("org/set.v2", "train[:10%]"), Source("other/set.v2")], ["org/set.v2", "other/set.v2"]),
        ([Source("org/set", "train"), Source("org/set", "test[10:]")], ["set-train", "set-test_10"]),
        ([Source("a.jsonl"), Source("a.jsonl")], ["1-a", "2-a"]),
        ([Source("shards/*.jsonl"), Source("über uns.txt")], ["shards", "ber_uns"]),
    ],
)
def test_sources_have_short_names(sources: list[Source], names: list[str]) -> None:
    assert short_names(sources) == names
