"""When the steps of an `sft train` ended, noted by a callback that the settings plant in it."""

import json
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback


class StepClock(Callback):
    """Writes to `path` the seconds on the wall and of all cores at the end of each optimizer step."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.ends: list[tuple[float, float]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.ends.append((time.perf_counter(), time.process_time()))

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.path.write_text(json.dumps(self.ends))
