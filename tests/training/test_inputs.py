"""A model and data that aren't here are looked for on the Hub, if that can be reached."""

import os
import socket
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from sft.config import CONF
from sft.errors import UserError
from sft.training.settings import check_inputs


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=list(overrides))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A port of this machine, on which nobody listens yet, as the Hub."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        yield bound


def test_without_a_connection(hub: socket.socket, model_folder: os.PathLike[str]) -> None:
    for names, setting in (
        (["model.path=org/missing", "data.path=org/rows"], "data.path=org/rows"),
        (["model.path=org/missing", f"model.tokenizer={model_folder}", "data=gsm8k"], "data.path=openai/gsm8k"),
    ):
        with pytest.raises(UserError) as refused:
            check_inputs(config(*names))
        line = str(refused.value)
        assert line.startswith(f"{setting} is neither in {os.getcwd()} nor in "), line
        assert line.endswith("and 127.0.0.1 can't be reached (Connection refused): give a folder, or download it first")
        assert os.environ.pop("HF_HUB_OFFLINE") == "1"  # so that nothing asks it again


def test_with_a_connection_the_hub_is_asked_later(hub: socket.socket) -> None:
    hub.listen()
    check_inputs(config("model.path=org/missing", "data.path=org/rows"))
    assert "HF_HUB_OFFLINE" not in os.environ
