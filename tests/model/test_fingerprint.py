"""A model's files are known again by their content."""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import settings
from sft.data import fingerprint as known_files
from sft.model import fingerprint as fingerprints
from sft.model.fingerprint import fingerprint


def test_each_part_by_its_files(model_folder: Path, tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    shutil.copytree(model_folder, model)
    source = settings.model_source(path=str(model))
    before = fingerprint(source, cache, template="t")
    assert {part: sorted(Path(name).name for name in files) for part, files in before.items()} == {
        "weights": ["model.safetensors"],
        "configuration": ["config.json"],
        "tokenizer": ["tokenizer.json", "tokenizer_config.json"],
        "template": ["the chat template"],
    }
    assert fingerprint(source, cache, weights=False).keys() == {"configuration"}
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    after = fingerprint(source, cache, template="u")
    assert [part for part in before if before[part] != after[part]] == ["template", "weights"]


def test_a_file_is_read_once_and_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "BLOCK", 10)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(range(35)))
    monkeypatch.setattr(known_files, "RACY_SECONDS", 0)  # what changed a moment ago is not remembered
    digest = fingerprints._file_hash(file, tmp_path / "memo")
    assert len(list((tmp_path / "memo").iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(fingerprints, "ThreadPoolExecutor", None)
        assert fingerprints._file_hash(file, tmp_path / "memo") == digest
    for at in (0, 9, 10, 34):  # in every block a changed byte counts
        content = bytearray(range(35))
        content[at] += 1
        file.write_bytes(content)
        assert fingerprints._file_hash(file, tmp_path / "memo") != digest
