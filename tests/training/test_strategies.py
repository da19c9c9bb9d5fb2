"""What of the strategies can be seen without their devices."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sft.training import strategies


def test_a_partitioned_model_has_its_buffers_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # DeepSpeed moves a model to the device only where it partitions it itself. `meta` stands for the device.
    import deepspeed

    class Whole:
        def __init__(self, **_: object) -> None: ...

        def _convert_to_zero_parameters(self, parameters: list[nn.Parameter]) -> None: ...

    monkeypatch.setattr(deepspeed.zero, "Init", Whole)
    monkeypatch.setattr(strategies.DeepSpeed, "root_device", torch.device("meta"))
    strategy = strategies.DeepSpeed({"zero_optimization": {"stage": 3}})
    strategy.precision_plugin = SimpleNamespace(precision="bf16-mixed")
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    strategy.shard(model)
    assert len(list(model.buffers())) == 3
    assert {tensor.device.type for tensor in [*model.buffers(), *model.parameters()]} == {"meta"}


def test_deepspeed_does_not_wait_for_the_device_to_time_micro_batches() -> None:
    assert strategies.DeepSpeed({}).config["timers"]["throughput"]["enabled"] is False
