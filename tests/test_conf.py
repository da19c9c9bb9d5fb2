"""Every file of conf/ composes and is what its comment says."""

import os
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from sft.config import CONF

# How sweeps are launched and drawn is tested by sweeps: tests/commands/test_sweep.py, tests/slurm/test_sweep.py
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")
FILES = sorted((group, path.stem) for group in GROUPS for path in (CONF / group).glob("*.yaml") if path.stem != "base")
# What a file leaves to the user, so that it can be instantiated.
NEEDED = {"model": ["+model.path=x", "model.tokenizer=x"], "trainer": ["trainer.accelerator=cpu"]}


def test_groups_are_those_of_the_design() -> None:
    assert (
        sorted(
            [
                "model",
                "adapter",
                "data",
                "strategy",
                "trainer",
                "optimizer",
                "schedule",
                "logger",
                "callbacks",
                "averaging",
                "cluster",
                "experiment",
                "debug",
            ]
        )
        == GROUPS
    )


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_option_composes_and_instantiates(
    group: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    needed = [item.removeprefix("+") for item in NEEDED.get(group, [])]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=[f"{group}={name}", *needed])
    OmegaConf.to_container(config, resolve=True)  # every interpolation
    if group in ("experiment", "debug"):
        return
    node = config[group]
    for target in _targets(node):
        get_method(target) if not target.rsplit(".", 1)[1][0].isupper() else None
    made = instantiate(node, _convert_="all")
    assert made is not None
    if group == "optimizer":
        import torch

        assert isinstance(made([torch.nn.Parameter(torch.zeros(2))]), torch.optim.Optimizer)
    if group == "schedule":
        assert 0 < made(0, 100) <= 1


@pytest.mark.parametrize(
    "command",
    ["train", "preview", "rehearse", "certify", "score", "generate", "export", "compare", "runs", "watch", "check"],
)
def test_every_command_has_a_configuration(command: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose(command) is not None


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_file_is_small_and_begins_with_what_it_is_for(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#")
    assert len(lines) <= 70
    assert os.path.getsize(path) < 4000


def _targets(node: object) -> list[str]:
    if not OmegaConf.is_dict(node):
        return []
    found = [node["_target_"]] if "_target_" in node else []  # type: ignore[index]
    return found + [target for key in node for target in _targets(OmegaConf.select(node, str(key)))]  # type: ignore[attr-defined, arg-type]
