"""Settings that contradict each other or the machine are refused before anything is loaded."""

from contextlib import nullcontext

import pytest
import torch
from hydra import compose, initialize_config_dir

from sft.config import CONF
from sft.errors import UserError
from sft.training.settings import check, check_devices


def checked(*overrides: str) -> tuple[int, int]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return check(compose("train", overrides=["global_batch_size=16", "trainer=cpu", *overrides]))


def test_ranks_and_accumulation() -> None:
    assert checked("micro_batch_size=2") == (1, 8)
    assert checked("micro_batch_size=2", "strategy=ddp", "trainer.devices=2", "trainer.num_nodes=2") == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["global_batch_size=3", "micro_batch_size=2"],
            "a global batch of 3 packs does not divide among 1 ranks in micro-batches of 2: use a global batch size of "
            "2 or 4, or a micro-batch size of 1 or 3",
        ),
        (
            ["max_time=90"],
            "max_time=90 is no time: set it like 4:00:00 (hours:minutes:seconds) or 1:12:00:00 (days first); a YAML "
            "file needs quotes around it",
        ),
        (["trainer.devices=2"], "strategy=single is for one device, and the trainer has 2: set strategy=ddp"),
        (
            ["strategy=deepspeed_zero2_offload", "optimizer=sgd"],
            "this strategy keeps the optimizer's states on the cpu, where DeepSpeed's own AdamW steps, and the "
            "optimizer is torch.optim.SGD: set optimizer=adamw, or a strategy without offload",
        ),
        (
            ["optimizer._target_=bitsandbytes.optim.PagedAdamW8bit"],
            "optimizer._target_=bitsandbytes.optim.PagedAdamW8bit: no checkpoint holds its states, which are in 8 bits "
            "or in pages: set optimizer=adamw with a strategy that shares the states out (deepspeed_zero2, fsdp2) or "
            "keeps them in host memory (deepspeed_zero2_offload), or adapter=lora",
        ),
        (
            ["strategy=deepspeed_zero1", "trainer.gradient_clip_algorithm=value"],
            "trainer.gradient_clip_algorithm=value: DeepSpeed clips by norm alone: set strategy=fsdp2, which shards as "
            "much, or trainer.gradient_clip_algorithm=norm",
        ),
        (
            ["trainer.precision=bf16-true"],
            "trainer.precision=bf16-true: a weight in bf16 moves by 1/256 of itself or not at all, so updates would be "
            "lost: set trainer.precision=bf16-mixed, which keeps weights in fp32 (under DeepSpeed those of the model "
            "are bf16 all the same), or adapter=lora, which is kept in fp32 beside frozen weights in bf16",
        ),
        (
            ["strategy=fsdp2", "adapter=lora", "adapter.use_dora=true"],
            "adapter.use_dora=true needs the norms of whole weights, which this strategy shards: set strategy=ddp or "
            "deepspeed_zero2",
        ),
        (
            ["strategy=deepspeed_zero3", "model.compile=true"],
            "model.compile=true: ZeRO-3 works before and after each layer, which breaks up every graph: set "
            "strategy=fsdp2, which shards as much, or model.compile=false",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        checked(*overrides)
    assert str(refused.value) == line


@pytest.mark.parametrize(
    ("accelerator", "devices", "visible", "environment", "message"),
    [
        ("gpu", 1, 0, {}, r"sees 0 GPUs: set trainer=cpu, or see why torch .* finds none"),
        ("gpu", -1, 0, {}, r"set trainer=cpu"),
        ("cuda", 8, 2, {}, r"trainer.devices=8, but this process sees 2 GPUs: set trainer.devices=2 or less"),
        (
            "auto",
            [0, 3],
            2,
            {"CUDA_VISIBLE_DEVICES": "4,5"},
            r"2 GPUs \(CUDA_VISIBLE_DEVICES=4,5\): set trainer.devices",
        ),
        ("gpu", 8, 1, {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "3"}, r"ask Slurm for --gpus-per-node=8"),
        ("gpu", 2, 2, {}, None),
        ("gpu", "auto", 2, {}, None),
        ("auto", 4, 0, {}, None),
        ("cpu", 4, 2, {}, None),
    ],
)
def test_gpus_that_are_not_there_are_refused(
    accelerator: str,
    devices: object,
    visible: int,
    environment: dict[str, str],
    message: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with nullcontext() if message is None else pytest.raises(UserError, match=message):
        check_devices(accelerator, devices)
