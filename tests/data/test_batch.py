import numpy as np
import torch

from sft.data.batch import make_batch
from sft.data.tokenization import IGNORE

SAMPLES = [
    (np.array([5, 6, 7], dtype=np.int32), np.array([IGNORE, 6, 7], dtype=np.int32)),
    (np.array([8, 9], dtype=np.int32), np.array([IGNORE, 9], dtype=np.int32)),
]


def test_samples_lie_end_to_end() -> None:
    batch = make_batch(SAMPLES, np.array([1, 0]), step_num_supervised=30)
    assert batch["input_ids"].tolist() == [[8, 9, 5, 6, 7]]
    assert batch["labels"].tolist() == [[IGNORE, 9, IGNORE, 6, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert batch["predicting"].tolist() == [0, 2, 3]
    assert batch["cu_seqlens"].tolist() == [0, 2, 5]
    assert (batch["max_seqlen"], batch["num_supervised"], batch["num_tokens"]) == (3, 30, 5)
    assert {batch[name].dtype for name in ("input_ids", "labels", "position_ids", "predicting")} == {torch.int64}  # type: ignore
    assert batch["cu_seqlens"].dtype == torch.int32


def test_no_samples_are_one_token_without_loss() -> None:
    batch = make_batch(SAMPLES, np.array([], dtype=np.int64), step_num_supervised=30)
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["labels"].tolist() == [[IGNORE]]
    assert batch["position_ids"].tolist() == [[0]]
    assert batch["predicting"].tolist() == []
    assert batch["cu_seqlens"].tolist() == [0, 1]
    assert (batch["max_seqlen"], batch["num_supervised"], batch["num_tokens"]) == (1, 30, 0)
