"""The frozen start of `bench train`: one set of weights, of tokens, and of global batches, on disk.

A process of its own, so that the one which starts the others stays small (`conditions.peak_rss` says why).
`python -m benchmarks.prepare FOLDER` reads FOLDER/options.json and writes FOLDER/plan.json beside what it names.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks import generated
from benchmarks.shapes import fields, flops
from sft.data.rows import Source
from sft.data.store import Store
from sft.training.datamodule import SFTDataModule


def main(folder: Path) -> None:
    options = json.loads((folder / "options.json").read_text())
    write_model(folder / "model", options)
    write_tokens(folder, options)


def write_tokens(folder: Path, options: dict[str, Any]) -> None:
    """A token store, and of each variant the plan of its steps."""
    rng = np.random.default_rng(options["seed"])
    tokens, supervised = generated.lengths(rng, options["samples"], options["longest"])
    generated.write_store(folder / "store", tokens, supervised, fields(options)["vocab_size"], rng)
    store = Store(folder / "store", [Source("generated")])
    unpacked = {"global_batch_size": options["global_batch"], "micro_batch_size": options["micro_batch"]}
    packed = {"global_batch_size": options["packs"], "micro_batch_size": options["micro_packs"]}
    settings = {"unpacked": unpacked, "packed": packed}
    plan = {
        variant: write_variant(folder, store, options, packing=variant == "packed", **settings[variant])
        for variant in options["variants"]
    }
    (folder / "plan.json").write_text(json.dumps(plan))


def write_model(folder: Path, options: dict[str, Any]) -> None:
    """Configuration, tokenizer and, unless `options` has `weights` false, weights drawn from the seed."""
    config = AutoConfig.for_model(**fields(options))
    if options.get("weights", True):
        torch.manual_seed(options["seed"])
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    # TRL asks for a tokenizer, of which it needs the name of the padding token.
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def write_variant(
    folder: Path,
    store: Store,
    options: dict[str, Any],
    packing: bool,
    global_batch_size: int,
    micro_batch_size: int,
) -> dict[str, Any]:
    """TRL's data set: the packs of this project's step plan in the order of its steps, one a row."""
    setting = {
        "seed": options["seed"],
        "epochs": 1,
        "max_length": options["max_length"],
        "packing": packing,
        "global_batch_size": global_batch_size,
        "micro_batch_size": micro_batch_size,
    }
    # Full steps only: of a smaller last one, TRL would make another number of micro-batches.
    num_steps = len(SFTDataModule(store, None, max_steps=None, **setting).epoch(0).packs) // global_batch_size
    data = SFTDataModule(store, None, max_steps=num_steps, **setting)
    steps = [data.step(k) for k in range(num_steps)]
    squares = [int((store.lengths[np.concatenate(step.packs)].astype(np.int64) ** 2).sum()) for step in steps]
    needed = flops(fields(options), options["lora"])
    rows = []
    for pack in (pack for step in steps for pack in step.packs):
        samples = [store[int(i)] for i in pack]
        rows.append(
            {
                "input_ids": np.concatenate([ids for ids, _ in samples]).tolist(),
                "labels": np.concatenate([labels for _, labels in samples]).tolist(),
                "seq_lengths": [len(ids) for ids, _ in samples],
            }
        )
    rows_folder = folder / ("packed" if packing else "unpacked")
    Dataset.from_list(rows).save_to_disk(rows_folder)
    return {
        "data": setting | {"max_steps": num_steps},
        "rows": str(rows_folder),
        "num_tokens": [step.num_tokens for step in steps],
        "num_supervised": [step.num_supervised for step in steps],
        "flops": [
            needed.of(step.num_tokens, step.num_supervised, square) for step, square in zip(steps, squares, strict=True)
        ],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
