"""Damaged manifests, checkpoints and sealed files → found, whatever the damage; no error but the project's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.test_checkpoint import trained
from runfiles import ANSWER
from sft.checkpoint import checkpoint as checkpoints
from sft.checkpoint import plain_state
from sft.checkpoint import save as saving
from sft.checkpoint.layout import Whole
from sft.errors import UserError
from sft.report.folder import Folder
from sft.report.progress import Progress
from sft.runs import answers_file, config_file, lease, manifest, provenance, saved
from sft.runs.results import Result
from sft.runs.run import Run

from .drawn import fuzz, mutated, objects, said, texts, values

CALLBACKS = {"best": {"score": torch.tensor(2.5), "step": 3}}


@pytest.fixture(scope="module")
def layout() -> Whole:
    return trained(hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=16, num_attention_heads=2)


def save(folder: Path, layout: Whole) -> checkpoints.Checkpoint:
    state: dict[str, Any] = {"num_steps": 9, "stopped": False, "val_loss": 0.5, "seed": 0}
    return saving.save(folder, 3, layout, CALLBACKS, state, {"probes": [[1, 2.5]]})


def as_before_manifests(folder: Path) -> None:
    """Rewrites a checkpoint in the format that had no checksum but those of its shards."""
    (folder / manifest.NAME).unlink()
    state = json.loads((folder / "state.json").read_bytes())
    del state[manifest.SEAL]
    files = {
        name: {"bytes": (folder / name).stat().st_size, "crc32": saved._crc32(folder / name)} for name in state["files"]
    }
    (folder / "state.json").write_text(json.dumps(state | {"format": 2, "files": files}))


def test_a_damaged_manifest_is_never_believed(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"abc")
    manifest.write(tmp_path, manifest.entries(tmp_path, ["a.bin"]))
    file = tmp_path / manifest.NAME
    written, files = file.read_bytes(), manifest.read(tmp_path, "")

    @given(mutated(st.just(written)) | st.binary(max_size=60) | objects.map(lambda value: json.dumps(value).encode()))
    def any_manifest(data: bytes) -> None:
        file.write_bytes(data)
        try:
            assert manifest.read(tmp_path, "put it back") == files
        except UserError as error:
            said(error, f"{file}")

    fuzz(any_manifest)


def test_any_object_is_kept_by_its_checksum_and_a_damaged_one_is_found(tmp_path: Path) -> None:
    file = tmp_path / "status.json"

    @given(objects, st.data())
    def any_object(value: dict[str, Any], data: st.DataObject) -> None:
        value.pop(manifest.SEAL, None)
        manifest.write_sealed(file, value)
        assert manifest.read_sealed(file, "", since=0) == value
        file.write_bytes(data.draw(mutated(st.just(file.read_bytes()))))
        try:
            assert manifest.read_sealed(file, "put it back", since=0) == value
        except UserError as error:
            said(error, f"{file}")

    fuzz(any_object)


@pytest.mark.parametrize("old", [False, True], ids=["", "before manifests"])
def test_no_damage_of_a_checkpoint_is_missed(tmp_path: Path, layout: Whole, old: bool) -> None:
    whole = save(tmp_path / "whole", layout).path
    if old:
        as_before_manifests(whole)
    assert saved.faults(whole) == []
    expected = [parameter.clone() for parameter in layout.model.parameters()]
    names = sorted(path.name for path in whole.iterdir() if not old or "callbacks" not in path.name)
    other = trained(1, hidden_size=8, intermediate_size=8, num_hidden_layers=1, vocab_size=16, num_attention_heads=2)

    @given(st.sampled_from(names), st.data())
    def any_damage(name: str, data: st.DataObject) -> None:
        folder = tmp_path / "checkpoints" / whole.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        before = (folder / name).read_bytes()
        after = data.draw(mutated(st.just(before)) | st.binary(max_size=40))
        (folder / name).write_bytes(after)
        if found := saved.faults(folder):
            assert all(str(folder) in fault and "\n" not in fault for fault in found)
            return
        if name not in ("state.json", manifest.NAME) and not (old and name.startswith("probes")):
            assert after == before
        try:
            checkpoint = checkpoints.Checkpoint(folder)
            checkpoint.restore(other)
            checkpoint.callbacks()
        except UserError as error:
            said(error, f"{folder}")
            return
        for parameter, value in zip(other.model.parameters(), expected, strict=True):
            assert torch.equal(parameter, value)

    fuzz(any_damage)


tensors = st.builds(
    lambda numbers, dtype: torch.tensor(numbers).to(dtype),
    st.lists(st.integers(0, 100), max_size=3),
    st.sampled_from((torch.float32, torch.bfloat16, torch.int64, torch.bool)),
)
states = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.binary(max_size=4) | tensors
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner)
    | st.dictionaries(texts | st.integers() | st.just(plain_state.KIND), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def alike(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(alike(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return repr(a) == repr(b)  # NaN is like itself


def test_any_state_of_callbacks_is_what_it_was() -> None:
    @given(states)
    def any_state(state: object) -> None:
        assert alike(plain_state.parse(plain_state.dump(state)), state)

    fuzz(any_state)


def test_any_bytes_as_an_old_file_of_callbacks(tmp_path: Path) -> None:
    file = tmp_path / "callbacks.pt"
    torch.save({"best": {"score": torch.tensor(2.5), "step": 3}}, file)
    written = file.read_bytes()

    @given(mutated(st.just(written)) | st.binary(max_size=60))
    def any_file(data: bytes) -> None:
        file.write_bytes(data)
        try:
            plain_state.read(tmp_path)
        except UserError as error:
            said(error, f"{file}")

    fuzz(any_file)


STATUS = {
    "state": "failed",
    "step": 4,
    "num_steps": 9,
    "host": "a",
    "pid": 1,
    "process": "p",
    "time": "t",
    "error": "e",
}
ORIGIN = {"started": "2026-01-01", "data": {"train": "a" * 64}, "commit": None, "versions": {"torch": "2.7"}}


def test_any_file_of_a_run_is_shown_or_said_in_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    whole = {}
    config_file.write(tmp_path, {"name": "a", "model": {"path": "m"}, "optimizer": {"lr": 0.1}, "max_steps": 9})
    manifest.write_sealed(tmp_path / "status.json", STATUS)
    manifest.write_sealed(tmp_path / "provenance.json", ORIGIN)
    (tmp_path / "samples.jsonl").write_text(json.dumps(ANSWER) + "\n" + json.dumps(ANSWER | {"step": 4}) + "\n")
    lease.take(tmp_path)
    lease.give_back()
    for file in tmp_path.iterdir():
        whole[file.name] = file.read_bytes()
    unsealed = st.fixed_dictionaries({}, optional=dict.fromkeys([*STATUS, *ORIGIN, *ANSWER, "owner", "ended"], values))

    @given(st.sampled_from(sorted(whole)), st.data())
    def any_file(name: str, data: st.DataObject) -> None:
        for other, written in whole.items():
            (tmp_path / other).write_bytes(written)
        damaged = mutated(st.just(whole[name])) | st.binary(max_size=60)
        (tmp_path / name).write_bytes(data.draw(damaged | unsealed.map(lambda value: json.dumps(value).encode())))
        for answer in answers_file.read(tmp_path):
            assert answer.keys() >= ANSWER.keys()
            assert isinstance(answer["step"], int) and isinstance(answer["score"], int | float)
        answers_file.keep_until(tmp_path, 2)
        lease.newest(tmp_path).by  # noqa: B018
        for look in (lambda: Result.read(run), lambda: provenance.recorded(tmp_path), lambda: lease.look(tmp_path)):
            try:
                look()
            except UserError as error:
                said(error, f"{tmp_path}")
        Folder.read(tmp_path)
        Progress.read(tmp_path)

    fuzz(any_file)
