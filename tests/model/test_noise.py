"""What is drawn for a token depends on its place in the run alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from conftest import tiny_llama
from made_up import pack
from runfiles import rows, weights
from running import Sft
from sft.data.batch import token_keys
from sft.model import attention
from sft.model.loss import nll
from sft.model.noise import TOKENS, _numbers, attach, watch

LENGTHS = [5, 9, 9, 3, 17]


def batch_of(numbers: list[int]) -> dict:
    """Samples of one pack, by number, with their keys."""
    whole = pack(LENGTHS)
    bounds = list(pairwise(whole["cu_seqlens"].tolist()))
    batch = pack([LENGTHS[number] for number in numbers])
    for name in ("input_ids", "labels"):
        batch[name] = torch.cat([whole[name][:, slice(*bounds[number])] for number in numbers], dim=1)
    keys = [token_keys(0, 7, number, LENGTHS[number]) for number in numbers]
    return batch | {"keys": torch.from_numpy(np.concatenate(keys))}


def llama() -> PreTrainedModel:
    return tiny_llama(attention_dropout=0.2, attn_implementation=attention.NAME)


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=264, n_embd=32, n_layer=2, n_head=4, attn_implementation=attention.NAME)
    )


@pytest.mark.parametrize("made", [llama, gpt2])
def test_a_sample_gets_the_same_numbers_alone_and_in_any_pack(made: object) -> None:
    torch.manual_seed(0)
    model, lines = made().train(), []  # type: ignore[operator]
    assert attach(model, 5.0)
    watch(model, lines.append)
    losses = {}
    for name, packs in {
        "whole": [[0, 1, 2, 3, 4]],
        "mixed": [[4, 0], [3, 2, 1]],
        "alone": [[n] for n in range(5)],
    }.items():
        model.zero_grad()
        for numbers in packs:
            batch = batch_of(numbers)
            TOKENS.use(batch)  # type: ignore[arg-type]
            nll(model, batch, plain_head=True).backward()  # type: ignore[arg-type]
        losses[name] = [parameter.grad.clone() for parameter in model.parameters()]
    for name in ("mixed", "alone"):
        for one, other in zip(losses["whole"], losses[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    assert lines == []  # nothing else was drawn
    # It is noise: without, the loss is another.
    noisy = nll(model, batch, plain_head=True)  # type: ignore[arg-type]
    assert abs(noisy - nll(model.eval(), batch, plain_head=True)) > 1e-3  # type: ignore[arg-type]


def test_numbers_are_uniform_and_independent() -> None:
    keys = torch.from_numpy(token_keys(0, 0, 0, 2000))
    uniform = _numbers(keys, 1, 500).double() / 2**32 + 0.5
    other = _numbers(keys, 2, 500).double() / 2**32 + 0.5
    for sums, count in ((uniform.mean(0), 2000), (uniform.mean(1), 500)):
        assert sums.sub(0.5).mul((12 * count) ** 0.5).std().item() == pytest.approx(1, abs=0.1)
    counts = torch.histc(uniform, 1000, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum().item() == pytest.approx(999, abs=250)  # chi squared, 5 deviations
    centred = (uniform - 0.5) * 12**0.5
    for pairs in (centred[:1000] * centred[1000:], centred[:, :250] * centred[:, 250:], centred * (other - 0.5)):
        assert abs(pairs.mean().item()) < 5 / pairs.numel() ** 0.5 * pairs.std().item()


def test_dropout_keeps_the_mean() -> None:
    model = nn.Sequential(nn.Dropout(0.25))
    model.config = tiny_llama().config
    assert attach(model, 0.0)  # type: ignore[arg-type]
    TOKENS.use({"keys": torch.from_numpy(token_keys(0, 0, 0, 400)), "cu_seqlens": torch.tensor([0, 400])})  # type: ignore
    dropped = model.train()(torch.ones(1, 400, 400))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert dropped.mean().item() == pytest.approx(1, abs=5 * (1 / 3) ** 0.5 / 400)


class Jitter(nn.Module):
    config = tiny_llama().config

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand_like(x)


def test_random_numbers_that_can_not_be_drawn_by_token_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENS, "by_sample", False)  # as a batch of several samples leaves it
    model, lines = Jitter(), []
    assert not attach(model, 0.0)  # type: ignore[arg-type]
    watch(model, lines.append)
    for _ in range(2):
        model(torch.ones(3))
    assert lines == [
        "this model draws random numbers of its own in training, which can't be drawn by token: with another "
        "micro_batch_size or number of ranks they are others"
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ("adapter=lora", "adapter.dropout=0.5", "optimizer.lr=0.1"),
        ("model.neftune_alpha=30", "model.config.attention_dropout=0.3"),
    ],
    ids=["adapter", "embeddings and attention"],
)
def test_micro_batch_changes_nothing(settings: tuple[str, ...], sft: Sft) -> None:
    common = ("optimizer=sgd", "optimizer.lr=0.3", "max_steps=3", "val_every=2", "export=false", *settings)
    assert sft.train("run=one", "micro_batch_size=1", *common) == 0
    assert sft.train("run=four", "micro_batch_size=4", "model.gradient_checkpointing=true", *common) == 0
    # The validation draws nothing, and the noise is there: without, the gradients are others.
    quiet = [setting for setting in common if "dropout" not in setting and "neftune" not in setting]
    assert sft.train("run=quiet", *quiet) == 0
    one, four, quiet = (rows(sft.run_folder(run)) for run in ("one", "four", "quiet"))
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        values = [[float(row[name]) for row in of if row[name]] for of in (one, four, quiet)]
        assert values[0] == pytest.approx(values[1], rel=2e-5)
        if name == "train/grad_norm":
            assert abs(values[0][-1] - values[2][-1]) > 1e-2
    assert one[0]["val/loss"] == quiet[0]["val/loss"]
    of_four = weights(sft.run_folder("four"))
    for name, tensor in weights(sft.run_folder("one")).items():
        torch.testing.assert_close(tensor, of_four[name], rtol=0, atol=2e-6, msg=name)
