"""`bench tracking`: what it costs to see what a run does. The same `sft train` in turn without and with all that is
measured, answered and tracked, each run a process of its own."""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.conditions import table
from benchmarks.generated import lengths
from benchmarks.shapes import fields

NAMES = ("off", "on")
OFF = ("logger=csv", "evaluation.samples=0", "evaluation.kl_tokens=0", "evaluation.layers_every=0")
EOS = 1  # ids 0 and 1 are special
Run = dict[str, float]


def measure(options: Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-") as temporary:
        folder = Path(temporary)
        prepare(folder, options)
        settings = {"off": OFF, "on": (f"logger={options.logger}",)}
        runs: dict[str, list[Run]] = {name: [] for name in NAMES}
        for repeat in range(options.repeats):
            for name in NAMES if repeat % 2 == 0 else reversed(NAMES):  # what comes second may be warmer
                runs[name].append(train(folder, options, settings[name]))
                shown = runs[name][-1]
                print(
                    f"  {repeat + 1} {name:4}{shown['tokens_per_second']:8,.0f} tokens/s in the steps, "
                    f"{shown['wall']:.1f} s in all   load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
    ratios = {
        key: [on[key] / off[key] for on, off in zip(runs["on"], runs["off"], strict=True)] for key in runs["on"][0]
    }
    medians = {name: {key: statistics.median(run[key] for run in runs[name]) for key in ratios} for name in NAMES}
    result: dict[str, Any] = {"runs": runs, "ratios": ratios, "medians": medians}
    result["median_ratios"] = {key: statistics.median(each) for key, each in ratios.items()}
    rows = [[name, *(f"{value:,.{0 if value > 99 else 2}f}" for value in medians[name].values())] for name in NAMES]
    rows.append(["on / off, median of pairs", *(f"{ratio:.3f}" for ratio in result["median_ratios"].values())])
    rows += [[f"  pair {i + 1}", *(f"{each[i]:.3f}" for each in ratios.values())] for i in range(options.repeats)]
    header = ["", "tokens/s", "median step", "tokens/CPU-s", "validations, s", "all, s"]
    table("without and with all of it", header, rows)
    print(
        "  tokens/s        in all steps after the warm-up but those that a validation follows, from end to end\n"
        "  validations, s  those intervals that have one, less the others' mean\n"
        "  all, s          the whole process",
        flush=True,
    )
    return result


def prepare(folder: Path, options: Namespace) -> None:
    """A model with random weights, a tokenizer whose tokens are words, and rows of them, in a process of its own."""
    (folder / "options.json").write_text(json.dumps({k: v for k, v in vars(options).items() if k != "json"}))
    started([sys.executable, "-m", "benchmarks.tracking", str(folder)], options)


def write(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    options = json.loads((folder / "options.json").read_text())
    shape, rng = fields(options), np.random.default_rng(options["seed"])
    vocab = {"<pad>": 0, "<eos>": EOS, **{f"w{number}": number for number in range(2, shape["vocab_size"])}}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(options["seed"])
    config = AutoConfig.for_model(**shape, eos_token_id=EOS, pad_token_id=0, bos_token_id=None)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    num_tokens, num_supervised = lengths(rng, options["samples"], options["longest"])

    def text(num: int) -> str:
        ids = (shape["vocab_size"] ** rng.random(num)).astype(int).clip(2, shape["vocab_size"] - 1)
        return " ".join(f"w{number}" for number in ids)

    with (folder / "rows.jsonl").open("w") as file:
        for whole, supervised in zip(num_tokens, num_supervised, strict=True):
            file.write(json.dumps({"prompt": text(whole - supervised) + " ", "response": text(supervised - 1)}) + "\n")


def train(folder: Path, options: Namespace, settings: tuple[str, ...]) -> Run:
    """Figures of one run."""
    runs, ends = folder / "runs", folder / "ends.json"
    shutil.rmtree(runs, ignore_errors=True)
    clock = f"+callbacks.clock={{_target_: benchmarks.clock.StepClock, path: {ends}}}"
    began = time.perf_counter()
    started(command(folder, options, (clock, "checkpoint.save_every=1000000", *settings)), options)
    wall = time.perf_counter() - began
    with (runs / "run" / "metrics.csv").open(newline="") as file:
        tokens = [float(row["train/tokens"]) for row in csv.DictReader(file) if row["train/tokens"]]
    intervals = [(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairwise(json.loads(ends.read_text()))]
    plain: list[tuple[float, ...]] = []  # tokens, seconds, seconds of all cores
    validated: list[tuple[float, ...]] = []
    # Of each step from the second on, the interval that ends with it; a validation lies in that of the step after it.
    for step, (num, interval) in enumerate(zip(np.diff(tokens).tolist(), intervals, strict=True), start=2):
        if step > options.warmup:
            (validated if (step - 1) % options.val_every == 0 else plain).append((num, *interval))
    total, seconds, cpu = map(sum, zip(*plain, strict=True))
    return {
        "tokens_per_second": total / seconds,
        "median_step": statistics.median(each / wall for each, wall, _ in plain),
        "tokens_per_cpu_second": total / cpu,
        "validations": sum(each[1] for each in validated) - len(validated) * seconds / len(plain),
        "wall": wall,
    }


def command(folder: Path, options: Namespace, settings: tuple[str, ...]) -> list[str]:
    """Of a run in `folder`."""
    return [
        *(sys.executable, "-m", "sft", "train", "run=run", f"runs_dir={folder}/runs", f"data.cache_dir={folder}/cache"),
        *(f"model.path={folder}/model", f"data.path={folder}/rows.jsonl", "data=prompt_response"),
        *("data.conversation.chat=false", f"data.max_length={options.max_length}", "data.val_size=16"),
        *("trainer=gpu" if options.gpu else "trainer=cpu", "export=false"),
        *(f"global_batch_size={options.packs}", f"max_steps={options.steps}", f"val_every={options.val_every}"),
        *settings,
        *options.overrides,
    ]


def environment(options: Namespace) -> dict[str, str]:
    """Of a process that is measured."""
    scripts = Path(__file__).parents[1]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(scripts), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(options.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
    }
    if not options.gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def started(arguments: list[str], options: Namespace) -> None:
    """Runs it, and shows its output only if it fails."""
    process = subprocess.run(arguments, env=environment(options), capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{process.stdout[-2000:]}{process.stderr[-4000:]}")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
