"""What validations measure against a plain loop over single samples, under every way of sharing them out."""

import json
import random
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runfiles import rows, weights
from running import Sft
from sft.data.labels import IGNORE
from sft.data.step_plan import eval_plan
from sft.evaluation.base import FixedTokens
from sft.training.validation import Validation

STOP = 258
SETTINGS = ("run=run", "max_steps=4", "val_every=2", "export=false", "evaluation.kl_tokens=40", "evaluation.samples=0")


def chat(draw: random.Random, num_turns: int) -> dict[str, Any]:
    messages = []
    for _ in range(num_turns):
        word = "".join(draw.choices("abcdefgh", k=draw.choice([3, 5, 20])))
        messages += [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
    return {"messages": messages}


@pytest.fixture
def chats(sft: Sft) -> tuple[str, ...]:
    """Settings of data with two files of validation, of one to five turns, and of a text; packs are of several rows."""
    draw = random.Random(1)
    for name, num in {"train": 40, "here/val": 5, "there/val": 4}.items():
        path = sft.folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(chat(draw, 1 + number % 5)) + "\n" for number in range(num)))
    (sft.folder / "text.txt").write_text(
        "A line of text.\n\nAnother one, of more words than fit: " + "word " * 90 + "\n"
    )
    return (
        *(setting for setting in sft.settings if not setting.startswith("data.path")),
        "data=messages",
        "data.path=train.jsonl",
        "data.val_path=[here/val.jsonl,there/val.jsonl]",
        "evaluation.text=text.txt",
    )


def plain_metrics(val: Any, base: Any, now: Any, text: list[list[int]]) -> dict[str, float]:
    """By loops over tokens."""

    def log_probs(model: Any, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids]), use_cache=False).logits[0].double().log_softmax(-1)

    groups: dict[str, list[float]] = defaultdict(list)
    stops: dict[str, list[float]] = defaultdict(list)
    correct, of_samples, places = [], [], []
    for index in range(len(val)):
        ids, labels = (part.tolist() for part in val[index])
        before, after = log_probs(base, ids), log_probs(now, ids)
        places += [(before[t], after[t], ids[t + 1]) for t in range(len(ids) - 1)]
        turn, response, own = 0, [], [0.0, 0.0, 0]
        for t in range(1, len(ids)):
            if labels[t] == IGNORE:
                continue
            response.append((float(-after[t - 1, ids[t]]), float(after[t - 1, STOP].exp()), int(after[t - 1].argmax())))
            correct.append(response[-1][2] == ids[t])
            own = [own[0] - float(before[t - 1, ids[t]]), own[1] + response[-1][0], own[2] + 1]
            if t + 1 < len(ids) and labels[t + 1] != IGNORE:
                continue
            turn += 1
            assert ids[t] == STOP
            nlls = [nll for nll, _, _ in response]
            groups[f"source/{'here' if index < 5 else 'there'}/val"] += nlls
            groups[f"length/{'1-15' if len(response) < 16 else '16-63'}"] += nlls
            groups[f"turn/{turn if turn < 4 else '4-up'}"] += nlls
            alive, length = 1.0, 0.0
            for _, p, _ in response[:-1]:
                length += alive
                alive *= 1 - p
            stops["stop_prob"].append(response[-1][1])
            stops["stop_recall"].append(response[-1][2] == STOP)
            stops["stop_early"].append(1 - alive)
            stops["expected_length"].append((length + alive) / len(response))
            response = []
        of_samples.append(own)
    total, num = sum(b - a for b, a, _ in of_samples), sum(n for _, _, n in of_samples)
    squares = sum((b - a - total / num * n) ** 2 for b, a, n in of_samples)
    fixed = [places[int((k + 0.5) * len(places) / 40)] for k in range(40)]
    of_text = [float(-row[token]) for ids in text for row, token in zip(log_probs(now, ids)[:-1], ids[1:], strict=True)]
    return {
        "val/accuracy": sum(correct) / len(correct),
        **{f"val/loss_by_{name}": sum(nlls) / len(nlls) for name, nlls in groups.items()},
        **{f"val/{name}": sum(values) / len(values) for name, values in stops.items()},
        "val/gain": total / num,
        "val/gain_error": (len(val) / (len(val) - 1) * squares) ** 0.5 / num,
        "val/kl_base": sum(float((p.exp() * (p - q)).sum()) for p, q, _ in fixed) / 40,
        "val/base_tokens_loss": sum(float(-q[token]) for _, q, token in fixed) / 40,
        "val/general_loss": sum(of_text) / len(of_text),
    }


def test_every_metric_is_that_of_a_plain_loop(
    sft: Sft, chats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Any] = []
    original = Validation.on_validation_epoch_end

    def end(self: Validation, trainer: Any, module: Any) -> None:
        original(self, trainer, module)
        seen.append(trainer.datamodule.val)

    monkeypatch.setattr(Validation, "on_validation_epoch_end", end)
    assert sft("train", *chats, *SETTINGS) == 0
    folder = Path(sft.settings[0].removeprefix("model.path="))
    base, now = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = [line for line in (sft.folder / "text.txt").read_text().split("\n") if line]
    ids = [tokenizer(line)["input_ids"] + [256] for line in lines]
    assert len(ids[1]) > 256
    text = [ids[0], ids[1][:256], ids[1][256:]]
    now.load_state_dict(weights(sft.run_folder()), strict=False)
    measured = rows(sft.run_folder())
    for row, model in ((measured[0], base), (measured[-1], now)):
        expected = plain_metrics(seen[0], base, model, text)
        found = {name: float(row[name]) for name in row if name.startswith("val/")}
        assert found.keys() - {"val/loss", "val/perplexity"} == expected.keys()
        assert found == pytest.approx(
            expected | {each: found[each] for each in ("val/loss", "val/perplexity")}, abs=1e-5
        )
        assert float(row["val/loss"]) == pytest.approx(
            found["val/gain"] * -1 + float(measured[0]["val/loss"]), abs=1e-5
        )
    # Two ranks, of which one has an empty batch at the end.
    plan = eval_plan(seen[0].lengths, max_length=256, packing=True, micro_batch_size=1, world_size=2, rank=1)
    assert len(plan[-1]) == 0
    for strategy in ("deepspeed_zero3", "fsdp2"):
        ranks = (f"strategy={strategy}", "micro_batch_size=1", "run=ranks")
        ended = sft.ranks(2, "train", *chats, *SETTINGS, *ranks)
        assert ended.code == 0, ended.output
        for row, other in zip(measured, rows(sft.run_folder("ranks")), strict=True):
            assert row.keys() == other.keys()
            for name in (name for name in row if name.startswith("val/") and row[name]):
                assert float(other[name]) == pytest.approx(float(row[name]), rel=2e-5, abs=2e-5), (
                    strategy,
                    row["step"],
                    name,
                )
        shutil.rmtree(sft.run_folder("ranks"))
    assert (measured[0]["val/kl_base"], measured[0]["val/gain"], measured[0]["val/gain_error"]) == ("0.0", "0.0", "0.0")
    assert float(measured[-1]["val/kl_base"]) > 0.01 and float(measured[-1]["val/gain"]) > 0.05
    # Fixed tokens are those of `FixedTokens`, prompts and responses.
    fixed = FixedTokens.spread(seen[0].lengths, 40)
    of_responses = [seen[0][s][1][p + 1] != IGNORE for s, p in zip(fixed.sample, fixed.position, strict=True)]
    assert 5 < sum(of_responses) < 35
    assert (
        "step 4: the stop token is the most probable one at the end of only 0% of the resp" in capsys.readouterr().out
    )


def test_a_resumed_run_compares_with_the_model_before_training(
    sft: Sft, chats: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sft("train", *chats, *SETTINGS) == 0
    whole = rows(sft.run_folder())
    # In the validation after step 2, which the resumed run begins with.
    signal = f"+callbacks.signal={{_target_: mishaps.InValidation, step: 2, once: {sft.folder / 'once'}}}"
    assert sft("train", *chats, *SETTINGS, "run=again", signal) == 75
    shutil.copytree(sft.run_folder("again"), sft.run_folder("lost"))
    assert sft("train", *chats, *SETTINGS, "run=again") == 0
    assert rows(sft.run_folder("again")) == whole
    (sft.run_folder("lost") / "base.safetensors").unlink()
    capsys.readouterr()
    assert sft("train", *chats, *SETTINGS, "run=lost") == 0
    line = "runs/lost/base.safetensors can't be read: nothing is compared with the model before training"
    assert capsys.readouterr().out.count(line) == 1
    compared = {"val/gain", "val/gain_error", "val/kl_base", "val/base_tokens_loss"}
    for row, other in zip(rows(sft.run_folder("lost"))[2:], whole[2:], strict=True):
        assert {name for name, value in other.items() if value != row[name]} == (compared if row["val/loss"] else set())
    # One that extends it begins with its weights. What else validates, stops by a metric or is off changes no number.
    more = ("run=more", "extend.run=run", "max_steps=6", "evaluation.kl_tokens=0")
    assert sft("train", *chats, *SETTINGS, *more) == 0
    first, last = rows(sft.run_folder("more"))[0], rows(sft.run_folder("more"))[-1]
    assert (first["val/loss"], first["val/gain"]) == (whole[-1]["val/loss"], "0.0")
    assert float(last["val/gain"]) == pytest.approx(float(first["val/loss"]) - float(last["val/loss"]), abs=1e-5)
    assert "val/kl_base" not in last
    stops = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=val/kl_base")
    assert sft("train", *chats, *SETTINGS, "run=average", "averaging=ema", *stops) == 0
    for row, other in zip(rows(sft.run_folder("average")), whole, strict=True):
        assert {name: value for name, value in row.items() if name != "val/loss_average"} == other


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "evaluation.text=mine.txt: there is no such file (looked in "),
        ("", "mine.txt: the file is empty"),
        ("\n\n", "evaluation.text=mine.txt: mine.txt: it has no rows"),
    ],
)
def test_a_text_that_cannot_be_read_is_refused_before_training(
    sft: Sft, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    if content is not None:
        Path("mine.txt").write_text(content)
    assert sft.train("run=run", "evaluation.text=mine.txt") == 2
    assert message in (error := capsys.readouterr().err) and error.count("\n") == 1
    assert not sft.run_folder().exists()
