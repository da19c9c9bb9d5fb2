"""A story is read as far as its lines are whole."""

from pathlib import Path

from sft.runs import events


def test_lines_that_are_damaged_are_left_out(tmp_path: Path) -> None:
    events.record(tmp_path, "start")
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b"\xff\n7\n" + b"[" * 10_000 + b'\n{"event": "start"}\n')
    events.record(tmp_path, "end")
    assert [event["event"] for event in events.read(tmp_path)] == ["start", "end"]
