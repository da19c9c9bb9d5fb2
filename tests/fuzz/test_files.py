"""Damaged files of a run → what of them is whole, or one line; nothing else."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from sft.errors import UserError
from sft.runs import events
from sft.runs.metrics_file import Following, Metrics, end

from .drawn import fuzz, mutated, said, values

METRICS = b"step,train/loss,val/loss,train/tokens_per_second\n1,2.5,,100.5\n2,2.25,2.75,101\n3,nan,,99\n"


def figures(path: Path) -> None:
    for metrics in (Metrics.read(path), end(path, "val/loss")):
        assert metrics.step >= 0
        for name in ("train/loss", "val/loss"):
            for figure in (metrics.first, metrics.last, metrics.lowest, metrics.median):
                assert isinstance(figure(name), float)


def test_any_bytes_as_metrics_have_figures_or_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"

    @given(st.binary(max_size=80) | mutated(st.just(METRICS)))
    def any_metrics(data: bytes) -> None:
        file.write_bytes(data)
        try:
            figures(file)
        except UserError as error:
            said(error, file.name)

    fuzz(any_metrics)


def test_a_file_that_grows_and_changes_is_followed_as_if_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"

    @given(
        st.lists(st.integers(0, len(METRICS)).map(lambda size: METRICS[:size]) | mutated(st.just(METRICS)), max_size=4)
    )
    def versions(contents: list[bytes]) -> None:
        file.unlink(missing_ok=True)
        following = Following(file, ["train/loss", "val/loss"])
        for data in contents:
            file.write_bytes(data)
            following.read()
        if contents:
            anew = Following(file, ["train/loss", "val/loss"])
            anew.read()
            assert len(following.curves["train/loss"].steps) == len(following.curves["train/loss"].values)
            if contents[-1].startswith(contents[-2] if len(contents) > 1 else b""):
                assert repr(following.curves) == repr(anew.curves)

    fuzz(versions)


def test_any_bytes_as_a_story_are_events(tmp_path: Path) -> None:
    event = b'{"time": "2026-01-01T00:00:00+00:00", "event": "start", "step": 3}\n'
    lines = st.lists(st.just(event) | values.map(lambda value: json.dumps(value).encode() + b"\n"), max_size=3)

    @given(st.binary(max_size=60) | lines.map(b"".join) | mutated(lines.map(b"".join)))
    def any_events(data: bytes) -> None:
        (tmp_path / "events.jsonl").write_bytes(data)
        for found in events.read(tmp_path):
            assert isinstance(found, dict) and isinstance(found["event"], str) and isinstance(found["time"], str)

    fuzz(any_events)
