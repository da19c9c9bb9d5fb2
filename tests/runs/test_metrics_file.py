"""metrics.csv is read as far as it is new, and a large one from its end."""

from pathlib import Path

import pytest

from sft.runs import metrics_file
from sft.runs.files import write_text
from sft.runs.metrics_file import Following, end

HEAD = "step,train/loss,val/loss\n"


def curves(following: Following) -> dict[str, dict[int, float]]:
    assert all(len(set(curve.steps)) == len(curve.steps) for curve in following.curves.values())
    return {name: dict(zip(c.steps, c.values, strict=True)) for name, c in following.curves.items()}


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.csv"
    following = Following(path, ["train/loss", "val/loss", "none"])
    assert not following.read()  # no file yet
    write_text(path, HEAD + "0,,9.5\n1,4.0,\n2,3.0,\n")
    assert following.read()
    assert curves(following) == {"train/loss": {1: 4.0, 2: 3.0}, "val/loss": {0: 9.5}, "none": {}}
    assert not following.read()
    taken: list[list[bytes]] = []
    take = following._take

    def noting(lines: list[bytes]) -> None:
        taken.append(lines)
        take(lines)

    monkeypatch.setattr(following, "_take", noting)
    with path.open("a") as file:
        file.write("3,2.5,\n4,2.2")  # the last is still being written
    assert following.read()
    assert (following.step, curves(following)["train/loss"]) == (3, {1: 4.0, 2: 3.0, 3: 2.5})
    with path.open("a") as file:
        file.write("5,\n")
    write_text(path, path.read_text().replace("4,2.25,", "4,2.25,2.75"))  # as after a validation
    assert following.read()
    assert curves(following) == {
        "train/loss": {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.25},
        "val/loss": {0: 9.5, 4: 2.75},
        "none": {},
    }
    assert taken == [[b"2,3.0,\n", b"3,2.5,\n"], [b"3,2.5,\n", b"4,2.25,2.75\n"]]


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        (HEAD + "1,4.0,\n2,3.0,\n", {1: 4.0, 2: 3.0}),  # resumed after step 2
        (HEAD + "1,4.0,\n2,3.0,\n3,7.0,\n4,8.0,\n5,9.0,\n", {1: 4.0, 2: 3.0, 3: 7.0, 4: 8.0, 5: 9.0}),
        (HEAD + "1,6.0,\n", {1: 6.0}),  # begun anew
        ("step,train/lr,train/loss\n1,1.0,4.0\n2,1.0,3.0\n3,1.0,2.5\n4,1.0,2.0\n", {1: 4.0, 2: 3.0, 3: 2.5, 4: 2.0}),
        ("", {}),
    ],
    ids=["shorter", "longer with other rows", "anew", "a new column", "empty"],
)
def test_a_file_that_was_written_anew_is_read_anew(text: str, loss: dict[int, float], tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    following = Following(path, ["train/loss"])
    write_text(path, HEAD + "1,4.0,\n2,3.0,\n3,2.5,\n4,2.0,\n")
    following.read()
    write_text(path, text)
    assert following.read()
    assert curves(following) == {"train/loss": loss}
    assert following.step == max(loss, default=0)


def test_another_header_is_seen_however_far_away_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_file, "KEPT", 4)
    path = tmp_path / "metrics.csv"
    following = Following(path, ["train/loss"])
    path.write_text(HEAD + "1,4.0,\n2,3.0,\n3,2.5,\n")
    following.read()
    path.write_text(HEAD.replace("train/loss,val/loss", "val/loss,train/loss") + "1,4.0,\n2,3.0,\n3,2.5,\n4,2.0,1.0\n")
    following.read()
    assert curves(following) == {"train/loss": {4: 1.0}}


def test_rows_that_are_no_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(HEAD.encode() + b"1,4.0,\n\xff\x00,1\nx,2.0,\n2,3.0\n3,oops,\n4,nan,\n")
    following = Following(tmp_path / "metrics.csv", ["train/loss"])
    following.read()
    assert list(following.curves["train/loss"].steps) == [1, 4]


@pytest.mark.parametrize("block", [16, 64, 1221, 10_000])  # 1221: within the row of the validation
def test_the_end_of_a_large_file_up_to_its_last_validation(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "BLOCK", block)
    path = tmp_path / "metrics.csv"
    rows = [f"{step},{1 / step:.4f},{'0.5' if step == 400 else ''}\n" for step in range(1, 501)]
    path.write_text(HEAD + "".join(rows) + "501,0.0")
    metrics = end(path, "val/loss")
    assert (metrics.step, metrics.last("val/loss"), metrics.last("train/loss")) == (500, 0.5, 0.002)
    first = 501 - len(metrics.rows)
    assert [row["step"] for row in metrics.rows] == [str(step) for step in range(first, 501)]
    monkeypatch.setattr(metrics_file, "MOST", 64)
    metrics = end(path, "val/loss")
    assert (metrics.step, len(metrics.rows) <= 100 or block == 10_000) == (500, True)


def test_the_end_of_no_file(tmp_path: Path) -> None:
    assert end(tmp_path / "none", "val/loss").rows == []
    (tmp_path / "empty").touch()
    assert end(tmp_path / "empty", "val/loss").step == 0
    (tmp_path / "cut").write_text("step,train/lo")
    assert end(tmp_path / "cut", "val/loss").step == 0


@pytest.mark.parametrize(
    "text", ["\0", "a\rb,step\n", "train/loss\n1.0\n", "step,step\n1,2\n", "step,val/loss\nx,1.0\n2,?\n"]
)
def test_the_end_of_a_damaged_file_has_no_rows(text: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    found = end(tmp_path / "metrics.csv", "val/loss")
    assert (found.step, found.rows) == (0, [])


def test_a_damaged_last_line_takes_no_value_from_the_row_before(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    write_text(path, HEAD + "1,4.0,\n2,3.0,9.0\n3?nan,\n")
    following = Following(path, ["train/loss", "val/loss"])
    for _ in range(3):
        following.read()
        assert curves(following) == {"train/loss": {1: 4.0, 2: 3.0}, "val/loss": {2: 9.0}}
