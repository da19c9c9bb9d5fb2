"""The folder of a run that wrote everything that a run can write, without training one."""

import csv
import json
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

BEGAN = datetime(2026, 3, 1, 9, 0, 0, tzinfo=UTC)
HOSTILE = "</script><img src=x onerror=alert(1)> & \x1b[31m \u202ereversed\u202c \u05d0\u05d1\u05d2 \x00 \ud800"


def write(folder: Path, num_steps: int = 400, every: int = 50, state: str = "finished", **changes: Any) -> Path:
    """A run of `num_steps` steps on two nodes, validated `every` so many, that was requeued once and killed once."""
    folder.mkdir(parents=True)
    lr = changes.get("lr", 1e-5)
    config = {
        "name": "sft",
        "run": folder.name,
        "runs_dir": "runs",
        "seed": changes.get("seed", 0),
        "epochs": 3,
        "model": {"path": "Qwen/Qwen3-0.6B"},
        "data": {"path": ["gsm8k/train.jsonl", "chats.jsonl"], "max_length": 2048},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": lr},
        "trainer": {"accelerator": "gpu", "devices": 4, "num_nodes": 2, "precision": "bf16-mixed"},
        "logger": {"api_key": "sk-very-secret", "project": "maths"},
    }
    _text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    at = num_steps if state == "finished" else num_steps // 2
    status = {"state": state, "step": at, "num_steps": num_steps, "host": "n1", "pid": 1, "process": None}
    status |= {"time": _time(3 * at + 900), **({"exported": at} if state == "finished" else {})}
    if state == "failed":
        status["error"] = "RuntimeError: CUDA error with api_key=sk-very-secret"
    _json(folder / "status.json", status)
    _json(folder / "provenance.json", _provenance())
    _json(folder / "data.json", _ledger())
    _json(folder / "recipe.json", _recipe(num_steps, lr))
    (folder / "export").mkdir()
    _json(folder / "export" / "verified.json", {"step": at, "num_tokens": 512, "largest_difference": 2.1e-5})
    _metrics(folder / "metrics.csv", num_steps, every, changes.get("seed", 0))
    lines(folder / "events.jsonl", _events(num_steps, every, state))
    lines(folder / "samples.jsonl", answers(num_steps, every))
    return folder


def _time(seconds: float) -> str:
    return (BEGAN + timedelta(seconds=seconds)).isoformat(timespec="seconds")


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="surrogatepass")


def _json(path: Path, value: object) -> None:
    _text(path, json.dumps(value))


def lines(path: Path, values: list[dict[str, Any]]) -> None:
    _text(path, "".join(json.dumps(value) + "\n" for value in values))


def _provenance() -> dict[str, Any]:
    return {
        "started": _time(0),
        "command": ["/somewhere/sft/__main__.py", "train", "experiment=gsm8k", "logger.api_key=sk-very-secret"],
        "commit": "63a0a019e3afabd7c6552547d938e72eb107466a",
        "uncommitted_diff": "+++ b/x.py\n-password = 'hunter22'\n+two = 2 # </pre><script>alert(2)</script>",
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "transformers": "5.24.0"},
        "data": {"train": "3c267d0d19d0"},
        "model": {"weights": {"Qwen/Qwen3-0.6B": "d9a633136f5d"}},
    }


def _counts(source: str, rows: int, lost: dict[str, int]) -> dict[str, Any]:
    examples = {reason: [{"row": 7, "place": f"{source} line 8", "why": HOSTILE}] for reason in lost}
    return {
        "source": source,
        "rows": rows,
        "samples": rows - sum(lost.values()),
        "tokens": 212 * rows,
        "supervised_tokens": 77 * rows,
        "rows_lost": sum(lost.values()),
        "lost": lost,
        "truncated_prompt": 3,
        "examples": examples,
        "unread": {"columns": {"id": rows}, "message_keys": {}},
        "stops": {"2": rows},
    }


def _ledger() -> dict[str, Any]:
    sources = [
        _counts("gsm8k/train.jsonl", 7473, {"overlong": 12}),
        _counts("<b>chats.jsonl", 1200, {"empty_response": 4}),
    ]
    return {"train": {"sources": sources}, "held_out": {"samples": 433, "of": "train"}}


def _recipe(num_steps: int, lr: float) -> dict[str, Any]:
    return {
        "num_ranks": 8,
        "num_nodes": 2,
        "hosts": ["n1", "n2"],
        "strategy": "FSDP2",
        "device": "NVIDIA H100 80GB HBM3",
        "precision": "bf16-mixed",
        "weights_dtype": "float32",
        "attention": "varlen",
        "gradient_checkpointing": True,
        "compile": False,
        "micro_batch_size": 1,
        "accumulation": 2,
        "global_batch_size": 16,
        "pack_length": 2048,
        "tokens_per_step": 32100.5,
        "supervised_tokens_per_step": 11800.25,
        "num_steps": num_steps,
        "num_parameters": 596049920,
        "num_trained_parameters": 596049920,
        "optimizer": "AdamW",
        "flops_per_token": 3.6e9,
        "peak_flops": None,
        "changed": {"optimizer.lr": [2e-5, lr], "logger.api_key": [None, "sk-very-secret"]},
    }


def _metrics(path: Path, num_steps: int, every: int, seed: int) -> None:
    draw, rows = random.Random(seed), []
    for step in range(num_steps + 1):
        row: dict[str, float] = {}
        if step:
            row |= {f"train/{name}": value for name, value in _trained(step, num_steps, draw).items()}
        if step % every == 0 or step == num_steps:
            row |= _validated(step / num_steps)
        rows.append({"step": str(step), **{name: repr(float(value)) for name, value in row.items()}})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _trained(step: int, num_steps: int, draw: random.Random) -> dict[str, float]:
    done = step / num_steps
    spike = 7.0 if step == num_steps // 2 + 3 else 0.0
    norm = 0.6 + 2 * math.exp(-12 * done) + draw.random() * 0.4 + spike
    lr = (1 + math.cos(math.pi * done)) / 2
    layers = ("embed", "layers.0-13", "layers.14-27", "head")
    return {
        "loss": 0.35 + 1.6 * math.exp(-9 * done) + draw.gauss(0, 0.06),
        "lr": 1e-5 * lr,
        "lr/*.mlp.*": 1e-6 * lr,
        "grad_norm": norm,
        "grad_norm_clipped": min(norm, 1.0),
        "clipped": float(norm > 1),
        "clipped_share": 0.3,
        "supervised_share": 0.36,
        "pack_fill": 0.98 - 0.02 * draw.random(),
        "tokens_per_second": 91000 + draw.gauss(0, 2500),
        "tokens": 32100 * step,
        "supervised_tokens": 11800 * step,
        "epoch": 3 * done,
        "seconds": 3.0,
        "mfu": 0.41 + draw.gauss(0, 0.01),
        "data_wait": 0.02 * draw.random(),
        "memory_peak": 61.2,
        **{f"weight_norm/{layer}": 30 + at + done for at, layer in enumerate(layers)},
        **{f"update_ratio/{layer}": 1e-4 * (1 + at) * (1.01 - done) for at, layer in enumerate(layers)},
    }


def _validated(done: float) -> dict[str, float]:
    loss = 0.42 + 1.5 * math.exp(-9 * done)
    return {
        "val/loss": loss,
        "val/perplexity": math.exp(loss),
        "val/loss_by_source/gsm8k": 0.9 * loss,
        "val/loss_by_source/chats": 1.3 * loss,
        "val/loss_by_length/1-64": 1.1 * loss,
        "val/loss_by_length/65-256": 0.95 * loss,
        "val/loss_by_turn/1": loss,
        "val/loss_by_turn/2": 1.05 * loss,
        "val/accuracy": 0.62 + 0.3 * done,
        "val/stop_prob": 0.1 + 0.85 * done,
        "val/stop_recall": 0.2 + 0.78 * done,
        "val/stop_early": 0.3 - 0.28 * done,
        "val/expected_length": 0.6 + 0.39 * done,
        "val/gain": 1.92 - loss,
        "val/gain_error": 0.012,
        "val/kl_base": 0.08 * done,
        "val/base_tokens_loss": 2.31 + 0.05 * done,
        "val/general_loss": 2.9 + 0.1 * done,
        "answers/score": 0.3 + 0.6 * done,
        "answers/exact": 0.6 * done,
        "answers/base_score": 0.3,
        "answers/stopped": 0.4 + 0.6 * done,
        "answers/length_ratio": 1.6 - 0.6 * done,
    }


def _events(num_steps: int, every: int, state: str) -> list[dict[str, Any]]:
    half = num_steps // 2 // every * every
    first, second, third = ({"job": 4711, "restart": restart} for restart in range(3))
    two = {"hosts": ["n1", "n2"], "num_ranks": 8}

    def event(at: float, kind: str, **details: Any) -> dict[str, Any]:
        return {"time": _time(at), "event": kind, **details}

    events = [
        event(-60, "submit", **first, options=["--nodes=2"], settings=["experiment=gsm8k"]),
        event(-30, "job", **first, job_nodelist="n[1-2]", ntasks="8", max_requeues={}),
        event(0, "start", **first, step=0, **two),
        *(event(3 * step, "save", **first, step=step, seconds=1.25) for step in range(every, half + 1, every)),
        event(3 * half + 5, "signal", **first, signal="SIGUSR1", step=half),
        event(3 * half + 9, "requeue", **first, cause="signal", step=half, why="1 of 100"),
        event(3 * half + 300, "start", **second, step=half, hosts=["n3"], num_ranks=4),
        event(3 * half + 400, "alert", step=half + 3, title="The loss spikes", text=HOSTILE),
        event(3 * half + 500, "requeue", **second, cause="lost", step=half, error="n3 was lost"),
        event(3 * half + 800, "start", **third, step=half, **two),
    ]
    if state == "failed":
        events.append(event(3 * half + 900, "failure", cause="failed", step=half + 30, error=HOSTILE))
    if state == "finished":
        later = range(half + every, num_steps + 1, every)
        events += [event(3 * step + 800, "save", **third, step=step, seconds=1.5) for step in later]
        events.append(event(3 * num_steps + 900, "finish", step=num_steps))
    return events


def answers(num_steps: int, every: int) -> list[dict[str, Any]]:
    prompts = [
        ("Natalia sold 48 clips in April, and half as many in May. How many?", "48 / 2 = 24\n48 + 24 = 72\n#### 72"),
        ("Translate to Hebrew: peace", "\u05e9\u05dc\u05d5\u05dd"),
        (HOSTILE, HOSTILE),
        ("Write a long story.", "Once upon a time. " * 400),
    ]
    answers = []
    for step in [*range(0, num_steps, every), num_steps]:
        for number, (prompt, reference) in enumerate(prompts):
            share = step / num_steps
            said = reference[: int(share * len(reference))] or "the the the the the"
            answers.append(
                {
                    "step": step,
                    "number": number,
                    "source": "gsm8k/test.jsonl",
                    "row": 17 * number,
                    "prompt": prompt,
                    "reference": reference,
                    "base": "the the the the the the the the",
                    "answer": said,
                    "score": round(0.1 + 0.9 * share, 3),
                    "base_score": 0.1,
                    "num_tokens": len(said) // 4 + 1,
                    "num_reference_tokens": len(reference) // 4 + 1,
                    "stopped": share > 0.4,
                }
            )
    return answers
