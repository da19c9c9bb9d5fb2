"""Training on a device that isn't the processor (`pretend`) makes the processor's numbers: nothing that the device
computes with is left in the host's memory, and nothing makes the host wait that needn't."""

import json
from pathlib import Path

import pytest

import pretend
from runfiles import last_checkpoint
from running import Ended, Sft
from sft.checkpoint.checkpoint import Checkpoint
from warm import PROCESSES


def train(sft: Sft, run: str, *arguments: str, device: bool) -> Ended:
    own = pretend.SETTINGS if device else ()
    fixed = (f"run={run}", "epochs=1", "micro_batch_size=1", "optimizer=sgd", "optimizer.lr=0.1")
    settings = ("train", *sft.settings, *fixed, *own, *arguments)
    return sft.process(*settings, before=pretend.install if device else None)


def last(sft: Sft, run: str) -> Checkpoint:
    return last_checkpoint(sft.run_folder(run))


def difference(one: Checkpoint, other: Checkpoint) -> float:
    assert one.step == other.step == 3
    assert one.shapes == other.shapes
    return max(float((one.tensor(name).float() - other.tensor(name).float()).abs().max()) for name in one.shapes)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("adapter=lora",),
        ("adapter=lora", "adapter.dropout=0.1", "model.gradient_checkpointing=true"),
        ("model.activation_offload=true",),
        ("trainer.precision=bf16-true", "adapter=lora"),
        ("model.attention=eager",),
    ],
    ids=" ".join,
)
def test_numbers_are_those_of_the_processor(sft: Sft, settings: tuple[str, ...]) -> None:
    export = "export=true" if not settings else "export=false"
    for device in (False, True):
        ended = train(sft, f"device-{device}", *settings, export, device=device)
        assert ended.code == 0, ended.output
    # In bf16 gradients are rounded.
    tolerance = 4e-3 if "trainer.precision=bf16-true" in settings else 1e-6
    assert difference(last(sft, "device-False"), last(sft, "device-True")) < tolerance


def test_resumed_there(sft: Sft) -> None:
    kill = "+callbacks.kill={_target_: mishaps.Mishap, step: 2, rank: 0, what: kill}"
    killed = train(sft, "killed", "checkpoint.save_every=1", "export=false", kill, device=True)
    assert killed.code == -9, killed.output
    again = train(sft, "killed", "checkpoint.save_every=1", "export=false", device=True)
    assert again.code == 0 and "resumed after step 1" in again.output, again.output
    assert train(sft, "whole", "checkpoint.save_every=1", "export=false", device=True).code == 0
    one, other = (last(sft, run) for run in ("killed", "whole"))
    assert difference(one, other) == 0
    for name in ("shard-00000-of-00001.safetensors", "probes.json"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "waits"),
    [
        # For the loss and the gradient's norm, which decide whether the run goes on.
        (("trainer.precision=bf16-true", "adapter=lora"), ["aten._local_scalar_dense.default"] * 2),
        # In fp32 attention also asks for the lengths of the samples, once a micro-batch.
        ((), ["aten._to_copy.default"] * 4 + ["aten._local_scalar_dense.default"] * 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_step_waits_for_the_device_where_it_must(
    sft: Sft, settings: tuple[str, ...], waits: list[str], tmp_path: Path
) -> None:
    count = f"+callbacks.count={{_target_: pretend.CountSyncs, path: {tmp_path}/syncs.json}}"
    ended = sft.process(
        *("train", *sft.settings, "run=run", "epochs=1", "micro_batch_size=1", "export=false"),
        *(*pretend.SETTINGS, count, *settings, "evaluation.layers_every=0"),  # a step that measures them reads them
        before=pretend.install_with_kernel,
    )
    assert ended.code == 0, ended.output
    seen = json.loads((tmp_path / "syncs.json").read_text())
    assert seen["steps"] == [waits] * 2
    # Before training, for the samples' lengths alone.
    assert set(seen["validation"][0]) <= {"aten._to_copy.default"}


def test_what_is_not_moved_is_found() -> None:
    process = PROCESSES.Process(target=pretend.mistakes_are_found)
    process.start()
    process.join()
    assert process.exitcode == 0
