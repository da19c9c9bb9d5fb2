"""scripts/chaos: its judge sees each outcome, and the whole of it sees faults that are planted in the project."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from checks import chaos, chaos_faults, chaos_judge
from checks.chaos_faults import Kind
from checks.chaos_judge import HUNG, LOST, REFUSED, SILENT, SURVIVED, TRACEBACK, Truth, Verdict
from checks.chaos_start import Ended, Planted, Start
from sft import cli
from sft.checkpoint import checkpoint
from sft.errors import UserError

REFUSAL = "sft: runs/run/checkpoints/step-00000004/state.json is damaged: remove the folder runs/x, and it resumes"


def ended(output: str, *codes: int | None) -> Ended:
    return Ended(list(codes or (0,)), [output])


def test_a_refusal_names_what_is_damaged_and_says_what_to_do() -> None:
    assert chaos_judge.refusal(ended(REFUSAL, 2), ["state.json"]) == REFUSAL
    lost = "sft: RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:29531"
    assert chaos_judge.refusal(Ended([2, 1], [REFUSAL, lost]), ["state.json"]) == REFUSAL
    assert chaos_judge.refusal(ended(lost, 1), ["gloo"]) is None
    assert chaos_judge.to_remove(REFUSAL) == "runs/x"
    assert chaos_judge.refusal(ended(REFUSAL, 2), ["metrics.csv"]) is None
    assert chaos_judge.refusal(ended("sft: state.json is damaged", 2), ["state.json"]) is None
    assert chaos_judge.refusal(ended("state.json is damaged: remove it", 2), ["state.json"]) is None
    assert chaos_judge.to_remove("sft: rows.jsonl has changed: put it back") is None


@pytest.mark.parametrize(
    "output",
    [
        "step 1\nTraceback (most recent call last):\n  File ...",
        "sft: KeyError: 'x'\n  at sft/run.py:82; all that is known of it: runs/run/crash-1.txt",
        "Fatal Python error: Segmentation fault",
        "terminate called without an active exception",
    ],
)
def test_a_crash_is_seen(output: str) -> None:
    assert chaos_judge.crashed(ended(output, 1))
    assert not chaos_judge.crashed(ended(f"{REFUSAL}\nno Traceback (most recent call last)", 2))


def finished(folder: Path, weights: bytes = b"w", rows: str = "1,5.0,0.1\n2,4.0,0.2\n") -> Path:
    last = folder / "checkpoints" / "step-00000002"
    last.mkdir(parents=True)
    (folder / "export").mkdir()
    (last / "shard-00000-of-00001.safetensors").write_bytes(weights)
    (folder / "export" / "model.safetensors").write_bytes(weights)
    (folder / "metrics.csv").write_text("step,train/loss,train/tokens_per_second\n" + rows)
    return folder


def test_any_other_byte_or_number_is_seen(tmp_path: Path) -> None:
    truth = Truth.of(finished(tmp_path / "truth"))
    assert truth.differs(finished(tmp_path / "same", rows="1,5.0,0.3\n2,4.0,0.1\n")) is None  # times are the machine's
    assert truth.differs(finished(tmp_path / "w", b"v")) == "export/model.safetensors is another"
    other = finished(tmp_path / "rows", rows="1,5.1,0.1\n2,4.0,0.2\n")
    assert truth.differs(other) == "metrics.csv differs: train/loss of step 1 is 5.1, not 5.0"
    assert truth.differs(other, with_metrics=False) is None
    assert "missing" in str(truth.differs(tmp_path / "nothing"))


def test_the_drawing_is_a_matter_of_the_seed_alone() -> None:
    weights = sum(kind.weight for kind in chaos.KINDS)
    first, again, other = (
        [chaos.drawn(seed, number, chaos.KINDS)[:2] for number in range(weights)] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert {kind.name for kind, _ in first} == {kind.name for kind in chaos.KINDS}  # each comes in a deck


def test_the_table_and_its_place_in_a_page(tmp_path: Path) -> None:
    outcomes = [(SURVIVED, "SIGKILL"), (REFUSED, "full disk"), (LOST, "full disk"), (chaos.MISSED, "full disk")]
    results = [chaos.Result(0, kind, "single", "", Verdict(outcome), 1.0) for outcome, kind in outcomes]
    assert chaos.counts(results) == [3, 1, 1, 1, 0, 0, 0]
    assert chaos.num_faults(results) == 1
    page = tmp_path / "page.md"
    page.write_text(f"before\n{chaos.BEGIN}\nold\n{chaos.END}\nafter\n")
    about = {"command": "scripts/chaos", "date": "2026-01-01", "minutes": 1.0, "cores": 2, "cpu": "some"}
    for _ in range(2):
        chaos.write(page, results, about)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| full disk | 2      |") == 1
    page.write_text("no place")
    with pytest.raises(SystemExit, match="no place"):
        chaos.write(page, results, about)


# Faults of the project, called in each process of a trial before anything else.


def forgets_the_optimizer() -> None:
    before = checkpoint.Checkpoint.restore

    def restore(self, layout, hyperparameters=True):  # type: ignore[no-untyped-def]
        before(self, layout, hyperparameters)
        for state in layout.optimizer.state.values():
            state["exp_avg"].zero_()

    checkpoint.Checkpoint.restore = restore  # type: ignore[method-assign]


def begins_anew() -> None:
    checkpoint.latest = lambda folder: None


def never_ends() -> None:
    checkpoint.Checkpoint.restore = lambda *_, **__: signal.pause()  # type: ignore[method-assign]


def raises() -> None:
    def restore(self, layout, hyperparameters=True):  # type: ignore[no-untyped-def]
        raise KeyError("a fault")

    checkpoint.Checkpoint.restore = restore  # type: ignore[method-assign]


def refuses_without_a_reason() -> None:
    def restore(self, layout, hyperparameters=True):  # type: ignore[no-untyped-def]
        raise UserError("something is wrong")

    checkpoint.Checkpoint.restore = restore  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chaos.Sweep]:
    # A run that was killed, with a file that nothing depends on damaged.
    kind = Kind("damage", chaos_faults.damaged("runs/run/report.html"), 1, ("single, no export",))
    return chaos.Sweep(tmp_path_factory.mktemp("chaos"), [kind])


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [
        ("", SURVIVED),
        ("forgets_the_optimizer", SILENT),
        ("begins_anew", LOST),
        ("refuses_without_a_reason", LOST),
        ("raises", TRACEBACK),
        ("never_ends", HUNG),
    ],
)
def test_a_fault_of_the_project_is_seen(sweep: chaos.Sweep, fault: str, outcome: str) -> None:
    result = sweep.one(0, 0, fault=fault and f"test_chaos:{fault}", limit=15 if outcome == HUNG else 120)
    assert result is not None
    assert result.verdict.outcome == outcome, result.verdict.why


def test_a_signal_comes_at_a_change_to_the_disk(tmp_path: Path) -> None:
    count = tmp_path / "count"
    counted = Start(tmp_path, ["--version"], planted={0: Planted(count=str(count), fault="test_chaos:writes_3_files")})
    assert counted.wait(60).code == 0
    assert count.read_text() == "3"
    for path in tmp_path.glob("change-*"):
        path.unlink()
    planted = Planted(signal.SIGKILL, 2, fault="test_chaos:writes_3_files")
    assert Start(tmp_path, ["--version"], planted={0: planted}).wait(60).code == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("change-*")] == ["change-0"]


def writes_3_files() -> None:
    def version(name: str) -> str:
        for number in range(3):
            Path(f"change-{number}").touch()
        return "1"

    cli.metadata.version = version
