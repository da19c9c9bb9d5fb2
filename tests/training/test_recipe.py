"""recipe.json is what the run really was, and names what differs from the defaults."""

import json

import pytest

from running import Sft
from sft.training import recipe

SETTINGS = ("export=false", "max_steps=2", "val_every=2")


def test_a_recipe_is_what_the_run_was(sft: Sft) -> None:
    assert sft.train("run=run", *SETTINGS, "adapter=lora", "adapter.r=4", "data.val_size=0") == 0
    made = json.loads((sft.run_folder() / "recipe.json").read_text())
    assert len(made.pop("hosts")) == 1
    changed = made.pop("changed")
    tokens, supervised = made.pop("tokens_per_step"), made.pop("supervised_tokens_per_step")
    (source,) = json.loads((sft.run_folder() / "data.json").read_text())["train"]["sources"]
    assert (3 * tokens, 3 * supervised) == pytest.approx((source["tokens"], source["supervised_tokens"]), abs=0.2)
    # Rank 4 beside q, k, v, o and three of the MLP, in 2 layers of 32 channels.
    adapter = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96)
    body = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    whole = 264 * 32 + body + 5 * 32
    flops = made.pop("flops_per_token")
    least = 4 * body + 6 * adapter + 4 * 264 * 32 * supervised / tokens
    assert least < flops < least + 6 * 2 * 32 * 60
    assert made == {
        "num_ranks": 1,
        "num_nodes": 1,
        "strategy": "single",
        "device": "cpu",
        "precision": "32-true",
        "weights_dtype": "float32",
        "optimizer_dtype": "float32",
        "attention": "packed",
        "samples": "packed",
        "attention_kernel": "scaled_dot_product_attention, a call for each sample",
        "experts": None,
        "gradient_checkpointing": False,
        "activation_offload": False,
        "compile": False,
        "micro_batch_size": 2,
        "accumulation": 2,
        "global_batch_size": 4,
        "packing": True,
        "pack_length": 256,
        "steps_per_epoch": 3,
        "num_steps": 2,
        "num_parameters": whole + adapter,
        "num_trained_parameters": adapter,
        "optimizer": "AdamW",
        "peak_flops": None,
    }
    assert changed["optimizer.lr"] == [2e-5, 0.01] and changed["adapter.r"] == [None, 4]
    assert changed["data.max_length"] == [2048, 256] and changed["export"] == [True, False]
    assert not [name for name in changed if name.startswith(("data.conversation", "trainer.devices", "schedule"))]


def test_a_recipe_that_cannot_be_made_ends_no_run(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "of_model", lambda model: 1 / 0)
    assert sft.train("run=run", *SETTINGS) == 0
    assert "recipe.json isn't written: ZeroDivisionError: division by zero\n" in capsys.readouterr().out
