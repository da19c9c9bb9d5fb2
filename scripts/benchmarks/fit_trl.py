"""One run of TRL's SFTTrainer on the same: `python -m benchmarks.fit_trl FOLDER VARIANT OUT`.

It is given every advantage that its settings offer without another result: no gradient checkpointing (its default),
the project's precision, and rows that are tokenized and packed already.
"""

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import load_from_disk
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.conditions import peak_rss, rss


class Clock(TrainerCallback):
    """When each optimizer step ended, and its loss."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []  # seconds on the wall, seconds of all cores
        self.losses: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def main(folder: Path, variant: str, out: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    plan = json.loads((folder / "plan.json").read_text())[variant]
    setting = plan["data"]
    torch.set_num_threads(options["threads"])
    before, _ = rss()
    started = time.perf_counter()
    clock = Clock()
    trainer = SFTTrainer(
        load(folder / "model", options),
        args=SFTConfig(
            output_dir=str(out.with_suffix("")),
            per_device_train_batch_size=setting["micro_batch_size"],
            gradient_accumulation_steps=setting["global_batch_size"] // setting["micro_batch_size"],
            max_steps=setting["max_steps"],
            max_length=setting["max_length"],
            packing=setting["packing"],  # with "bfd", the default, rows are laid end to end without padding
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
            optim="adamw_torch_fused",
            learning_rate=options["lr"],
            lr_scheduler_type="constant",
            adam_beta1=options["betas"][0],
            adam_beta2=options["betas"][1],
            weight_decay=0.0,
            max_grad_norm=options["clip"],
            bf16=(options["precision"] or ("bf16-mixed" if options["gpu"] else "")) == "bf16-mixed",
            use_cpu=not options["gpu"],
            gradient_checkpointing=options["checkpointing"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=setting["seed"],
        ),
        train_dataset=load_from_disk(plan["rows"]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[clock],
        peft_config=lora(options["lora"]) if options["lora"] else None,
    )
    trainer.train()
    result = {"started": started, "ends": clock.ends, "losses": clock.losses}
    result |= {"rss_before": before, "rss_peak": peak_rss()}
    if options["gpu"]:
        result["cuda_peak"] = torch.cuda.max_memory_allocated()
    out.write_text(json.dumps(result))


def load(folder: Path, options: dict[str, Any]) -> Any:
    """The same model: from the same weights, or where none are on disk drawn at random."""
    settings = {
        "dtype": torch.bfloat16 if options["precision"] == "bf16-true" else torch.float32,
        # Its own advice for packing; without the wheel transformers' mask keeps the samples apart.
        "attn_implementation": "flash_attention_2" if options["gpu"] and find_spec("flash_attn") else "sdpa",
    }
    if options["weights"]:
        return AutoModelForCausalLM.from_pretrained(folder, **settings)
    with torch.device("cuda" if options["gpu"] else "cpu"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), **settings)


def lora(rank: int) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
