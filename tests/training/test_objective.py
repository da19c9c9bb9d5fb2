"""What is added to −log p, in a run: the same however the work is shared out, and logged in columns of its own."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from made_up import SIZE
from runfiles import rows, weights
from running import Sft

COLUMNS = ("train/loss", "train/label_smoothing", "train/z_loss", "train/router_aux", "train/expert_load_max")


def test_what_is_added_is_the_same_however_the_work_is_shared_out(
    sft: Sft, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "max_position_embeddings": 512}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZE | experts)).save_pretrained(sft.folder / "experts")
    common = (
        *("optimizer=sgd", "optimizer.lr=0.3", "max_steps=3", "data.val_size=0", "export=false"),
        *(f"model.path={sft.folder}/experts", f"model.tokenizer={model_folder}"),
    )
    objective = ("loss.label_smoothing=0.2", "loss.z_loss=0.01", "loss.router_aux=0.3")
    for run, settings in {
        "one": ("micro_batch_size=1", *objective),
        "four": ("micro_batch_size=4", *objective),
        "plain": ("micro_batch_size=4",),
    }.items():
        assert sft.train(f"run={run}", *common, *settings) == 0
    line = "4 experts without a load-balancing loss: loss.router_aux=0.001 adds the one of its authors\n"
    assert capsys.readouterr().out.count(line) == 1
    one, four, plain = (rows(sft.run_folder(run)) for run in ("one", "four", "plain"))
    for name in (*COLUMNS, "train/grad_norm"):
        values = [[float(row[name]) for row in of] for of in (one, four)]
        assert values[0] == pytest.approx(values[1], rel=2e-5), name
    # The first loss is −log p, as without; what is added has columns only where it is on.
    assert float(one[0]["train/loss"]) == pytest.approx(float(plain[0]["train/loss"]))
    assert not set(COLUMNS[1:]) & plain[0].keys()
    assert 1 <= float(one[0]["train/expert_load_max"]) < 2
    assert float(one[0]["train/router_aux"]) == pytest.approx(0.3 * 2, rel=0.1)  # even shares of 2 of 4 experts
    of_four, of_plain = weights(sft.run_folder("four")), weights(sft.run_folder("plain"))
    for name, tensor in weights(sft.run_folder("one")).items():
        torch.testing.assert_close(tensor, of_four[name], rtol=0, atol=2e-6, msg=name)
    router = "model.layers.0.mlp.gate.weight"
    assert (of_four[router] - of_plain[router]).abs().max() > 1e-4
