import numpy as np
import pytest
import torch

from sft.data.batch import make_batch, to_device
from sft.data.labels import IGNORE
from sft.proof.excerpt import Excerpt

PAIRS = [
    (np.array([5, 6, 7], dtype=np.int32), np.array([IGNORE, 6, 7], dtype=np.int32)),
    (np.array([8, 9], dtype=np.int32), np.array([IGNORE, 9], dtype=np.int32)),
]
SAMPLES = Excerpt(PAIRS, 5)
WEIGHTED = Excerpt(PAIRS, 5, [np.array([0, 0.5, 3], dtype=np.float32), np.array([0, 2], dtype=np.float32)])


def test_samples_lie_end_to_end() -> None:
    batch = make_batch(SAMPLES, np.array([1, 0]), step_weight=30)
    assert batch["input_ids"].tolist() == [[8, 9, 5, 6, 7]]
    assert batch["labels"].tolist() == [[IGNORE, 9, IGNORE, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch["predicting"].tolist() == [0, 2, 3]
    assert batch["weights"] is None
    assert batch["cu_seqlens"].tolist() == [0, 2, 5]
    assert (batch["max_seqlen"], batch["step_weight"], batch["num_tokens"]) == (3, 30, 5)
    assert batch["counts"].tolist() == [[2, 1, 0], [3, 2, 0]]
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids", "predicting")} == {torch.int64}  # type: ignore
    assert batch["cu_seqlens"].dtype == torch.int32


def test_each_supervised_token_keeps_its_weight() -> None:
    batch = make_batch(WEIGHTED, np.array([1, 0]), step_weight=5.5)
    weights = batch["weights"]
    assert weights is not None and weights.dtype == torch.float32
    assert weights.tolist() == [2, 0.5, 3]  # of tokens 9, 6 and 7, which are predicted from the ones before them
    assert batch["step_weight"] == 5.5
    assert make_batch(WEIGHTED, np.array([], dtype=np.int64), step_weight=5.5)["weights"] is None


def test_no_samples_are_one_token_without_loss() -> None:
    batch = make_batch(SAMPLES, np.array([], dtype=np.int64), step_weight=30)
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["labels"].tolist() == [[IGNORE]]
    assert batch["position_ids"].tolist() == [[0]]
    assert batch["predicting"].tolist() == []
    assert batch["cu_seqlens"].tolist() == [0, 1]
    assert (batch["max_seqlen"], batch["step_weight"], batch["num_tokens"]) == (1, 30, 0)


@pytest.mark.parametrize(("kind", "waits"), [("cuda", False), ("mps", True)])
def test_what_goes_to_a_gpu(kind: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []

    def to(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        moved.append((tensor.shape, device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor[None])
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch = make_batch(SAMPLES, np.array([1, 0]), step_weight=30)
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
    there = to_device(batch, torch.device(kind, 0))
    assert moved == [((value if waits else value[None]).shape, kind, not waits) for value in tensors]
    assert (there["max_seqlen"], there["step_weight"], there["num_tokens"]) == (3, 30, 5)
