"""The update is the same however the work is shared out, and a run's folder holds what it should."""

import json
import os
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import observers
import offline
from made_up import drawn, weigh
from runfiles import rows, weights
from running import Sft
from sft.checkpoint.checkpoint import complete
from sft.data.batch import Batch
from sft.runs import events, lease
from sft.runs.process import live_process
from sft.training.module import SFTModule

SGD = ("optimizer=sgd", "optimizer.lr=0.5", "trainer.gradient_clip_val=null", "schedule=constant")


def weights_of(sample: dict[str, list]) -> list[float]:
    """1 where there is loss, unless the sample brings weights."""
    return sample.get("weights", [float(label != -100) for label in sample["labels"]])


def reference(sft: Sft, steps: list[list[dict[str, list]]], lr: float) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of a loop that shares no code with training: whole logits, a sample at a time, SGD by hand."""
    path = sft.settings[0].removeprefix("model.path=")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").train()
    losses = []
    for step in steps:
        count = sum(sum(weights_of(sample)) for sample in step)
        total = torch.zeros(())
        for sample in step:
            logits = model(torch.tensor([sample["input_ids"]]), use_cache=False).logits[0, :-1]
            labels = torch.tensor(sample["labels"])[1:]
            terms = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
            total = total + (torch.tensor(weights_of(sample))[1:] * terms).sum()
        model.zero_grad()
        (total / count).backward()
        losses.append(total.item() / count)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= lr * parameter.grad
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def planned(sft: Sft, num_steps: int, packing: bool = True) -> list[list[dict[str, list]]]:
    """The samples of each step, from the step plan over what `sft preview` dumps."""
    from sft.data.step_plan import epoch_plan

    assert sft("preview", *sft.settings, "preview.dump=samples.jsonl", "preview.packs=1", "data.val_size=0") == 0
    samples = [json.loads(line) for line in (sft.folder / "samples.jsonl").read_text().splitlines()]
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples]).numpy()
    plan = epoch_plan(lengths, lengths, seed=0, epoch=0, global_batch_size=4, max_length=256, packing=packing)
    assert plan.num_steps >= num_steps
    return [[samples[int(index)] for pack in plan.step(step).packs for index in pack] for step in range(num_steps)]


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4], ids=lambda size: f"accumulation {4 // size}")
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_update_is_that_of_a_plain_loop(sft: Sft, micro_batch_size: int, packing: bool) -> None:
    # The 3rd packed step is the epoch's last and smaller: 4 + 4 + the rest.
    settings = (*SGD, f"micro_batch_size={micro_batch_size}", f"data.packing={packing}", "data.val_size=0")
    assert sft.train("run=run", "epochs=1", "max_steps=3", "export=false", *settings) == 0
    losses, expected = reference(sft, planned(sft, 3, packing), lr=0.5)
    for row, loss in zip(rows(sft.run_folder()), losses, strict=True):
        assert float(row["train/loss"]) == pytest.approx(loss, abs=1e-6)
    made = weights(sft.run_folder())
    assert made.keys() == expected.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "unpacked"])
def test_weighted_update_is_that_of_a_plain_loop_however_it_is_shared_out(sft: Sft, packing: bool) -> None:
    steps = planned(sft, 3, packing)
    steps = [[sample | {"weights": drawn(sample["labels"])} for sample in step] for step in steps]
    losses, expected = reference(sft, steps, lr=0.1)
    weigh(sft.folder / "cache")
    common = (*SGD, "optimizer.lr=0.1", f"data.packing={packing}", "data.val_size=0", "max_steps=3", "export=false")
    for micro_batch_size in (1, 2, 4):
        assert (
            sft.train(f"run=accumulate-{4 // micro_batch_size}", f"micro_batch_size={micro_batch_size}", *common) == 0
        )
    two = ("micro_batch_size=1", "strategy=ddp", "trainer.devices=2", *common)
    ended = sft.process("train", *sft.settings, "run=two-ranks", *two)
    assert ended.code == 0, ended.output
    for run in ("accumulate-1", "accumulate-2", "accumulate-4", "two-ranks"):
        for row, loss in zip(rows(sft.run_folder(run)), losses, strict=True):
            assert float(row["train/loss"]) == pytest.approx(loss, abs=2e-6)
        for name, tensor in weights(sft.run_folder(run)).items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-6, msg=name)


def test_validation_is_a_weighted_mean(sft: Sft, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sft("preview", *sft.settings, "preview.packs=1") == 0
    weigh(sft.folder / "cache")
    batches: list[Batch] = []
    original = SFTModule.validation_step

    def validation_step(self: SFTModule, batch: Batch, batch_idx: int) -> None:
        batches.append(batch)
        original(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "validation_step", validation_step)
    assert sft.train("run=run", "max_steps=1", "export=false", "micro_batch_size=1", "data.packing=false") == 0
    model = AutoModelForCausalLM.from_pretrained(sft.settings[0].removeprefix("model.path="))
    weighted, weight = 0.0, 0.0
    for batch in batches:
        for begin, end in pairwise(batch["cu_seqlens"].tolist()):
            ids, labels = batch["input_ids"][:, begin:end], batch["labels"][0, begin:end].tolist()
            log_probs = model(ids, use_cache=False).logits[0].log_softmax(-1)
            of_tokens = drawn(labels)
            weighted -= sum(of_tokens[t] * log_probs[t - 1, ids[0, t]].item() for t in range(1, len(of_tokens)))
            weight += sum(of_tokens)
    assert len(batches) == 2 * 3  # before and after the step
    assert float(rows(sft.run_folder())[0]["val/loss"]) == pytest.approx(weighted / weight, abs=1e-5)


def test_two_ranks_equal_one(sft: Sft) -> None:
    common = (*sft.settings, *SGD, "epochs=2", "export=false", "micro_batch_size=1", "val_every=2")
    one = sft.process("train", *common, "run=one")
    assert one.code == 0, one.output
    two = sft.process("train", *common, "run=two", "strategy=ddp", "trainer.devices=2")  # Lightning starts the other
    assert two.code == 0, two.output
    first, second = weights(sft.run_folder("one")), weights(sft.run_folder("two"))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)
    for before, after in zip(rows(sft.run_folder("one")), rows(sft.run_folder("two")), strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if value:
                assert float(after[key]) == pytest.approx(float(value), rel=1e-5), (before["step"], key)


def test_other_ranks_are_free_while_the_first_exports(sft: Sft) -> None:
    # NCCL ends a communicator when all of its ranks do: those that are done would hold their GPUs for the export.
    settings = ("train", *sft.settings, "run=run", "max_steps=1", "micro_batch_size=1", "strategy=ddp")
    ended = sft.ranks(2, *settings, before=observers.process_group_in_the_export)
    assert ended.code == 0, ended.output
    assert "process group False" in ended.output
    assert (sft.run_folder() / "export" / "verified.json").exists()


def test_resume_with_another_accumulation(sft: Sft) -> None:
    # Rule 4: the plan is a function, so a run goes on with its work shared out otherwise.
    settings = (*SGD, "epochs=2", "checkpoint.save_every=2", "val_every=2", "export=false")
    assert sft.train("run=whole", "micro_batch_size=4", *settings) == 0
    kill = "+callbacks.kill={_target_: mishaps.Mishap, step: 4, rank: 0, what: kill}"
    begun = ("train", *sft.settings, "run=run", "micro_batch_size=4", *settings)
    assert sft.process(*begun, kill).code == -9
    assert complete(sft.run_folder() / "checkpoints")[-1].step == 2
    assert sft.train("run=run", "micro_batch_size=1", *settings) == 0
    whole = weights(sft.run_folder("whole"))
    for name, tensor in weights(sft.run_folder()).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-6, msg=name)
    assert [row["step"] for row in rows(sft.run_folder())] == [str(step) for step in range(7)]


def test_global_batch_of_more_than_an_epoch_runs_no_more_micro_batches_than_it_fills(
    sft: Sft, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    micro_batches: list[int] = []
    original = SFTModule.training_step

    def training_step(self: SFTModule, batch: Batch, batch_idx: int) -> torch.Tensor:
        micro_batches.append(len(batch["predicting"]))
        return original(self, batch, batch_idx)

    monkeypatch.setattr(SFTModule, "training_step", training_step)
    settings = (*SGD, "epochs=2", "export=false", "data.val_size=0")
    assert sft.train("run=whole", "global_batch_size=12", "micro_batch_size=1", *settings) == 0
    assert "is more than" not in capsys.readouterr().out
    micro_batches.clear()
    assert sft.train("run=run", "global_batch_size=100000", *settings) == 0
    line = "global_batch_size=100000 is more than the 12 packs of an epoch: each step trains on all of them\n"
    assert line in capsys.readouterr().out
    assert len(micro_batches) == 2 * 6 and all(micro_batches)
    whole = weights(sft.run_folder("whole"))
    for name, tensor in weights(sft.run_folder()).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=2e-6, msg=name)


def test_clipping_and_the_logged_norm(sft: Sft) -> None:
    # SGD with rate 1 moves the weights by the clipped gradient: its norm is the limit, where the limit is lower.
    settings = ("optimizer=sgd", "optimizer.lr=1.0", "schedule=constant", "schedule.warmup=0", "max_steps=1")
    assert sft.train("run=run", "trainer.gradient_clip_val=0.01", "export=false", *settings) == 0
    start = load_file(Path(sft.settings[0].removeprefix("model.path=")) / "model.safetensors")
    moved = torch.cat([(t - start[name]).flatten() for name, t in weights(sft.run_folder()).items()])
    assert float(rows(sft.run_folder())[1]["train/grad_norm"]) > 0.5
    assert float(rows(sft.run_folder())[1]["train/grad_norm_clipped"]) == pytest.approx(0.01)
    assert float(moved.norm()) == pytest.approx(0.01, rel=1e-3)


def test_clipping_by_value_and_the_logged_norm(sft: Sft) -> None:
    settings = ("optimizer=sgd", "optimizer.lr=1.0", "schedule=constant", "schedule.warmup=0", "max_steps=1")
    value = ("trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=0.001")
    start = load_file(Path(sft.settings[0].removeprefix("model.path=")) / "model.safetensors")
    moved = {}
    for run, clipping in {"none": ("trainer.gradient_clip_val=0",), "value": value}.items():
        assert sft.train(f"run={run}", "export=false", "data.val_size=0", *settings, *clipping) == 0
        moved[run] = {name: start[name] - t for name, t in weights(sft.run_folder(run)).items()}
        # What is logged is the norm of what the weights moved by.
        norm = torch.cat([t.flatten() for t in moved[run].values()]).norm().item()
        assert float(rows(sft.run_folder(run))[0]["train/grad_norm_clipped"]) == pytest.approx(norm, rel=1e-4)
    for name, gradient in moved["none"].items():
        torch.testing.assert_close(moved["value"][name], gradient.clamp(-0.001, 0.001), rtol=0, atol=1e-6)


def test_bf16_learns_and_exports(sft: Sft) -> None:
    assert sft.train("run=run", "epochs=2", "trainer.precision=bf16-mixed") == 0
    metrics = rows(sft.run_folder())
    assert float(metrics[-1]["val/loss"]) < float(metrics[0]["val/loss"]) - 1
    verdict = json.loads((sft.run_folder() / "export" / "verified.json").read_text())
    assert verdict["equal"]
    assert verdict["precision"] == "bf16-mixed"
    assert {tensor.dtype for tensor in weights(sft.run_folder()).values()} == {torch.float32}


@pytest.mark.parametrize("saver", ["model.gradient_checkpointing=true", "model.activation_offload=true"])
def test_saving_memory_changes_no_number(sft: Sft, saver: str) -> None:
    settings = ("max_steps=3", "export=false", "+model.config.attention_dropout=0.1")
    assert sft.train("run=run", *settings) == 0
    assert sft.train("run=less-memory", saver, *settings) == 0
    expected = weights(sft.run_folder())
    for name, tensor in weights(sft.run_folder("less-memory")).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6, msg=name)


def test_name_follows_the_numbers_and_nothing_else(sft: Sft) -> None:
    quick = ("max_steps=1", "export=false")
    assert sft.train(*quick) == 0
    (first,) = (sft.folder / "runs").iterdir()
    assert first.name.startswith("sft-")
    assert sft.train(*quick, "micro_batch_size=4", "data.num_workers=2", "model.attention=sdpa") == 0
    assert list((sft.folder / "runs").iterdir()) == [first]
    assert sft.train(*quick, "seed=1") == 0
    assert len(list((sft.folder / "runs").iterdir())) == 2


def test_same_name_for_other_numbers_is_refused(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    assert sft.train("run=run", "max_steps=1", "export=false", "optimizer.lr=0.5") == 2
    assert "is a run with optimizer.lr=0.01, not 0.5: give this one another name" in capsys.readouterr().err


def test_changed_data_is_not_the_same_run(sft: Sft, data_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = sft.folder / "rows.jsonl"
    own.write_bytes(data_file.read_bytes())
    settings = ("run=run", "max_steps=2", "export=false", "data.path=rows.jsonl")
    assert sft.train(*settings) == 0
    (sft.run_folder() / "status.json").unlink()
    own.write_text(own.read_text().replace("Reverse", "Turn"))
    assert sft.train(*settings) == 2
    assert "the data has changed since" in capsys.readouterr().err


def test_folder_tells_the_whole_story(sft: Sft) -> None:
    assert sft.train("run=run", "max_steps=2") == 0
    folder = sft.run_folder()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["command"][1] == "train"
    assert provenance["versions"]["torch"] == version("torch")
    assert yaml.safe_load((folder / "config.yaml").read_text())["global_batch_size"] == 4
    (source,) = json.loads((folder / "data.json").read_text())["train"]["sources"]
    assert (source["rows"], source["samples"], source["lost"]) == (60, 60, {})
    assert "Reverse" in (folder / "preview.html").read_text()
    assert [row["step"] for row in rows(folder)] == ["0", "1", "2"]


@pytest.mark.parametrize(("logger", "expected"), [("wandb", "wandb"), ("tensorboard", "tensorboard")])
def test_trackers(sft: Sft, logger: str, expected: str) -> None:
    ended = sft.process("train", *sft.settings, f"logger={logger}", "run=run", "max_steps=1", "export=false")
    assert ended.code == 0, ended.output
    found = any((sft.run_folder() / expected).rglob("*.wandb" if logger == "wandb" else "events.*"))
    assert found, ended.output
    assert (sft.run_folder() / "metrics.csv").exists()


def test_second_process_at_the_same_run_is_refused(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    assert sft.train("run=run", "max_steps=1", "export=false") == 0
    held = lease.newest(sft.run_folder())
    assert held and held.owner and held.owner["ended"]
    parent = os.getppid()
    owner = held.owner | {"pid": parent, "process": live_process(parent), "ended": False}
    held.path.write_text(json.dumps(owner))
    assert sft.train("run=run", "max_steps=1", "export=false") == 2
    assert f"is being trained by process {parent} on {owner['host']}, for" in capsys.readouterr().err


def test_run_that_another_has_taken_over_is_left_to_it(sft: Sft) -> None:
    """At the loss nothing of the folder changes any more but the log of this process."""
    taken = f"+callbacks.taken={{_target_: mishaps.TakenOver, step: 3, folder: {sft.run_folder()}}}"
    ended = sft.process("train", *sft.settings, "run=run", "export=false", "checkpoint.save_every=1", taken)
    assert ended.code == 2, ended.output
    assert "was taken over by process 1 on n8, for 0 min, while this process stood still" in ended.output
    assert "Traceback" not in ended.output
    folder = sft.run_folder()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    assert [row["step"] for row in rows(folder)] == ["0", "1", "2"]
    assert json.loads((folder / "status.json").read_text())["state"] == "running"
    story = [event["event"] for event in events.read(folder)]
    assert [event for event in story if event != "first_batch"] == ["start", "save", "save"]


def test_early_stopping_ends_with_a_checkpoint_and_an_export(sft: Sft) -> None:
    stop = (
        "callbacks=early_stopping",
        "callbacks.early_stopping.patience=1",
        "optimizer.lr=1e-12",
        "val_every=1",
    )
    assert sft.train("run=run", "epochs=3", *stop) == 0
    status = json.loads((sft.run_folder() / "status.json").read_text())
    assert status["state"] == "finished"
    assert status["step"] < 9
    assert complete(sft.run_folder() / "checkpoints")[-1].step == status["step"]
    assert (sft.run_folder() / "export" / "verified.json").exists()


def test_multirun_makes_runs_of_their_own_in_the_tracker_too(sft: Sft) -> None:
    ended = sft.process("train", "-m", *sft.settings, "logger=wandb", "max_steps=1", "export=false", "seed=1,2")
    assert ended.code == 0, ended.output
    folders = sorted((sft.folder / "runs").glob("sft-*"))
    assert len(folders) == 2
    tracked = [path.name for folder in folders for path in folder.rglob("run-*.wandb")]
    ids = [(folder / "wandb" / "id").read_text() for folder in folders]
    assert sorted(tracked) == sorted(f"run-{each}.wandb" for each in ids), ended.output
    assert sorted(offline.run(folder)["name"] for folder in folders) == ["seed=1", "seed=2"]


def test_loss_that_is_no_number_ends_the_run_and_is_never_saved(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    breaks = "+callbacks.breaks={_target_: mishaps.Mishap, step: 3, rank: 0, what: spoil}"
    assert sft.train("run=run", "checkpoint.save_every=1", breaks) == 2
    assert "sft: step 3: the loss is nan, the gradient's norm nan, so nothing of this step is saved" in (
        capsys.readouterr().err
    )
    folder = sft.run_folder()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    assert (folder / "metrics.csv").read_text().splitlines()[-1].startswith("2,")
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"]) == ("failed", 2)
    (told,) = [each for each in events.read(folder) if each["event"] == "failure"]
    assert (told["cause"], told["step"]) == ("not_finite", 2)


def test_each_validation_set_is_measured_and_all_together(sft: Sft, capsys: pytest.CaptureFixture[str]) -> None:
    lines = Path(sft.settings[1].removeprefix("data.path=")).read_text().splitlines(keepends=True)
    for name, some in {"easy": lines[:9], "hard": lines[9:20], "more": lines[20:22], "train": lines[22:]}.items():
        Path(f"{name}.jsonl").write_text("".join(some))
    settings = ("max_steps=1", "export=false", "data.path=train.jsonl")
    sets = "data.val_path={easy: easy.jsonl, hard-1: [hard.jsonl, more.jsonl]}"
    stops = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=val/loss/hard-1")
    assert sft.train("run=sets", *settings, sets, *stops) == 0
    assert "; easy " in capsys.readouterr().out
    assert sft.train("run=all", *settings, "data.val_path=[easy.jsonl,hard.jsonl,more.jsonl]") == 0
    assert sft.train("run=easy", *settings, "data.val_path=easy.jsonl", "data.packing=false") == 0
    assert sft.train("run=hard", *settings, "data.val_path=[hard.jsonl,more.jsonl]") == 0
    ended = sft.ranks(2, "train", *sft.settings, *settings, "run=ranks", sets, "strategy=ddp", "micro_batch_size=1")
    assert ended.code == 0, ended.output
    runs = ("sets", "all", "easy", "hard", "ranks")
    measured, together, easy, hard, ranks = (rows(sft.run_folder(run)) for run in runs)
    for row, other in zip(measured, together, strict=True):
        assert float(row["val/loss"]) == pytest.approx(float(other["val/loss"]), abs=1e-6)
    for before in (measured[0], ranks[0]):
        assert float(before["val/loss"]) == pytest.approx(float(together[0]["val/loss"]), abs=1e-6)
        assert float(before["val/loss/easy"]) == pytest.approx(float(easy[0]["val/loss"]), abs=1e-6)
        assert float(before["val/loss/hard-1"]) == pytest.approx(float(hard[0]["val/loss"]), abs=1e-6)
        assert before["val/loss/easy"] != before["val/loss/hard-1"]
    assert float(measured[1]["val/loss/hard-1"]) == pytest.approx(float(hard[1]["val/loss"]), abs=1e-6)
    ledger = json.loads((sft.run_folder("sets") / "data.json").read_text())
    assert ledger["validation"]["sets"] == {"easy": 9, "hard-1": 13}


@pytest.mark.parametrize(
    ("val_path", "line"),
    [
        ("{a/b: DATA}", "a mapping to them of the validation sets' names (at most 30 letters, digits, - and _)"),
        ("{}", "a mapping to them"),
        ("{easy: DATA}", "is validation and training at once"),
    ],
)
def test_validation_sets_that_can_not_be(
    sft: Sft, val_path: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = sft.settings[1].removeprefix("data.path=")
    assert sft.train(f"data.val_path={val_path.replace('DATA', data)}") == 2
    assert line in capsys.readouterr().err
