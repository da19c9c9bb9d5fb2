"""`make demo`: a base model, a fine-tuning, and what it taught: the main job on data that makes itself.

Calls the same commands as a user would, prints them, and skips what is done. With `--check` it fails unless the
fine-tuning taught what it should.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import which

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from demo_assets import write_assets
from sft.config import CONF
from sft.runs.files import write_json
from sft.runs.metrics_file import Metrics
from sft.runs.run import Run

ASSETS = Path(os.environ.get("SFT_CACHE", "cache")) / "demo"
BASE, TUNED = Run(Path("runs/demo-base")), Run(Path("runs/demo"))
SHOWN_PER_TASK = 1


def main() -> None:
    print(f"1/4 data and tokenizer: {ASSETS} ({'written' if write_assets(ASSETS, seed=0) else 'there already'})")
    print("\n2/4 pre-training of a base model, the loss on every token")
    sft("train", "experiment=demo_base")
    print("\n3/4 supervised fine-tuning, the loss on the responses")
    sft("train", "experiment=demo")
    print("\n4/4 held-out prompts, none of whose words was in any training text")
    base, tuned = report(evaluate())
    if "--check" in sys.argv and not (base <= 0.05 and tuned >= 0.95):
        sys.exit(f"exact match went from {base:.1%} to {tuned:.1%}; it should go from at most 5 % to at least 95 %")


def sft(*arguments: str) -> None:
    """Runs the `sft` beside this Python, W&B offline, and ends with it where it fails."""
    print("$ sft", *arguments, flush=True)
    command = [str(Path(sys.executable).with_name("sft")), *arguments]
    code = subprocess.run(command, env={**os.environ, "WANDB_MODE": "offline"}).returncode
    if code:
        sys.exit(code)


def evaluate() -> list[dict[str, str]]:
    """Each held-out row with both models' answers; kept in the run's folder."""
    path = TUNED.folder / "answers.json"
    if not path.exists():
        from transformers import AutoTokenizer  # these with torch, which isn't needed while training runs

        from sft.commands.generate import answers
        from sft.data.prompt import served_ids
        from sft.training.prepare import quiet

        quiet()
        rows = [json.loads(line) for line in (ASSETS / "test.jsonl").read_text().splitlines()]
        prompts = [row["prompt"] for row in rows]
        row_function = instantiate(TUNED.config["data"]["conversation"], _convert_="all")
        settings = OmegaConf.merge(OmegaConf.load(CONF / "generate.yaml"), {"max_new_tokens": 32, "batch_size": 140})
        assert isinstance(settings, DictConfig)
        for name, run in (("base", BASE), ("tuned", TUNED)):
            print(f"answering {len(prompts)} prompts with {run.exported()}", flush=True)
            tokenizer = AutoTokenizer.from_pretrained(run.exported())
            token_ids = [served_ids(tokenizer, row_function, prompt) for prompt in prompts]
            made = answers(run.exported(), tokenizer, token_ids, settings)
            for row, answer in zip(rows, made, strict=True):
                row[name] = answer
        write_json(path, rows)
    return json.loads(path.read_text())


def report(rows: list[dict[str, str]]) -> tuple[float, float]:
    """Prints the table to judge the fine-tuning by, and where everything lies; returns both exact matches."""
    console = Console(width=max(100, Console().width), highlight=False)
    table = Table("task", "prompt", "base model", "tuned model", "reference", title="held-out prompts")
    shown: dict[str, int] = {}
    for row in rows:
        shown[row["task"]] = shown.get(row["task"], 0) + 1
        if shown[row["task"]] <= SHOWN_PER_TASK:
            table.add_row(row["task"], row["prompt"], short(row["base"]), short(row["tuned"]), row["response"])
    console.print(table)
    metrics = Metrics.read(TUNED.folder / "metrics.csv")
    figures = Table(show_header=False, box=None)
    base, tuned = (sum(row[name] == row["response"] for row in rows) / len(rows) for name in ("base", "tuned"))
    first, last = metrics.first("val/loss"), metrics.last("val/loss")
    figures.add_row("exact match", f"{base:.1%} base, {tuned:.1%} tuned, of {len(rows)} held-out prompts")
    figures.add_row("validation loss", f"{first:.3f} before, {last:.3f} after")
    figures.add_row("speed", f"{metrics.median('train/tokens_per_second'):,.0f} tokens/s (median step)")
    figures.add_row("base model", str(BASE.export))
    figures.add_row("tuned model", str(TUNED.export))
    figures.add_row("metrics", f"{TUNED.folder / 'metrics.csv'}, W&B offline in {TUNED.folder / 'wandb'}")
    figures.add_row("what was trained", f"{TUNED.folder / 'preview.html'}, {TUNED.folder / 'data.json'}")
    figures.add_row("all answers", str(TUNED.folder / "answers.json"))
    figures.add_row("try it", f'{script()} generate demo --prompt "Write tomato backwards."')
    figures.add_row("report", f"{TUNED.folder / 'report.html'}: open it in a browser")
    console.print(figures)
    return base, tuned


def script() -> str:
    """`sft` as it is typed in this shell, whose environment may not be active."""
    beside = Path(sys.executable).with_name("sft")
    return "sft" if which("sft") == str(beside) else os.path.relpath(beside)


def short(text: str) -> str:
    """On one line of the table."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= 24 else text[:23] + "…"


if __name__ == "__main__":
    main()
