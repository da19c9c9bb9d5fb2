"""Texts with ${...} that mean only themselves."""

from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sft.config.literal import escaped, instantiate, literal, resolved

TEXTS = ["${seed}", "\\${seed}", "a\\\\${oc.env:HOME} $ {b} ${", "${${x}}", "plain", "$", "\\", "100 %"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_stays_as_it_is(text: str) -> None:
    settings = {"seed": 3, "a": {"b": [text, {"c": text}]}, "twice": 1.5}
    config = literal(settings)
    assert OmegaConf.to_container(config, resolve=True) == settings
    assert OmegaConf.to_container(resolved(resolved(config)), resolve=True) == settings
    config.a = escaped({"b": text})
    assert config.a.b == text


@pytest.mark.parametrize("convert", [{}, {"_convert_": "all"}])
@pytest.mark.parametrize("text", TEXTS)
def test_instantiate_resolves_once(text: str, convert: dict[str, str]) -> None:
    node = {"_target_": "builtins.dict", "a": text, "b": {"_target_": "pathlib.Path", "_args_": [text]}, "c": [text]}
    config = literal(
        {"seed": 3, "node": {**node, "later": {"_target_": "builtins.dict", "_partial_": True, "x": text}}}
    )
    config.node.seed = "${seed}"  # a reference that the user has typed
    for made in (instantiate(config.node, **convert), instantiate(OmegaConf.to_container(config.node, resolve=True))):
        later = made.pop("later")
        assert isinstance(later, partial) and later() == {"x": text}
        assert made == {"a": text, "b": Path(text), "c": [text], "seed": 3}


def test_nothing_is_nothing() -> None:
    assert instantiate(None) is None and instantiate({}) == {} and instantiate(literal({})) == {}
