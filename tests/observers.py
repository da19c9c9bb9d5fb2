"""What is seen of a run in its own process: callbacks, planted by `+callbacks.NAME={_target_: observers....}`, and
functions that it calls before anything else."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, WeightAveraging

from sft.training.strategies import placement


class Facts(Callback):
    """Each rank writes to `factsRANK.json` what its model is before its first use."""

    def on_sanity_check_start(self, trainer: L.Trainer, module: Any) -> None:
        model = module.model
        part = placement(trainer.strategy).layout.part
        facts = {
            "buffers": {name: str(buffer.dtype) for name, buffer in model.named_buffers()},
            "parameters": {name: str(parameter.dtype) for name, parameter in model.named_parameters()},
            "numel": {name: part(name, parameter).numel for name, parameter in model.named_parameters()},
            "decay": {
                name: group["weight_decay"]
                for group in trainer.optimizers[0].param_groups
                for name in group["param_names"]
            },
            "training": model.training,
            "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        }
        Path(f"facts{trainer.local_rank}.json").write_text(json.dumps(facts))


class Averages(WeightAveraging):
    """A class of the user's own over one of Lightning's."""


class Counts(Callback):
    """Counts steps in `path`, and keeps the count as Lightning's hooks want it, or in a `form` that nothing can read
    again."""

    def __init__(self, path: str, form: str = "number") -> None:
        self.path, self.form, self.number = Path(path), form, 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.number += 1
        self.path.write_text(str(self.number))

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        if self.form == "weights":
            checkpoint["state_dict"].clear()
        checkpoint["own"] = self.number if self.form == "number" else Path("object")

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        self.number = checkpoint["own"]


class OwnMetric(Callback):
    """Measures one in training."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        module.log("own", float(-batch_idx), on_step=True)


def process_group_in_the_export() -> None:
    """Prints whether the export finds one."""
    from sft.commands import export

    original = export.export_run

    def announced(*arguments: Any) -> Any:
        print("process group", dist.is_initialized())
        return original(*arguments)

    export.export_run = announced
