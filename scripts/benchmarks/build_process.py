"""A token store's building measured in a fresh process: `python -m benchmarks.build_process < request`."""

import json
import os
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoTokenizer

from benchmarks import old_mask
from benchmarks.conditions import peak_rss
from sft.config import CONF
from sft.data.rows import Source

BATCH = 256  # texts that the tokenizer library encodes at once


def main() -> None:
    request = json.load(sys.stdin)
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = instantiate(compose("train", request["settings"]).data, _convert_="all")
    runs: dict[str, list[dict[str, float]]] = {"build": [], "library": [], "old": []}
    for repeat in range(request["repeats"]):
        if request["beside"]:  # in turn, so that a busy moment of the machine is nobody's alone
            runs["library"].append(library(tokenizer, config, request["path"]))
        own = replace(config, cache_dir=f"{config.cache_dir}-{repeat}")
        runs["build"].append(build(tokenizer, own, request["path"]))
    if request["beside"]:
        runs["old"].append(old(tokenizer, config, request["path"]))
    json.dump(runs, sys.stdout)


def build(tokenizer: Any, config: Any, path: str) -> dict[str, float]:
    """The whole build, through what training calls: from the file to the published store."""
    begun = Clock()
    store = config.store([Source(path)], tokenizer, log=lambda line: None)
    measured = begun.seconds()
    (counts,) = store.counts
    # Of any one process that it started; without workers, of this process, whatever it has imported included.
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = workers if config.num_workers > 1 and workers else peak_rss()
    return {**measured, "rows": counts["rows"], "tokens": counts["tokens"], "lost": counts["rows_lost"], "peak": peak}


def library(tokenizer: Any, config: Any, path: str) -> dict[str, float]:
    """The tokenizer library by itself, on the texts of the same rows, rendered before the clock starts."""
    texts = [old_mask.render(tokenizer, row.messages) for row in conversations(config, path)]
    begun = Clock()
    tokens = 0
    for start in range(0, len(texts), BATCH):
        encodings = tokenizer.backend_tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
        tokens += sum(len(encoding.ids) for encoding in encodings)
    return {**begun.seconds(), "rows": len(texts), "tokens": tokens}


def old(tokenizer: Any, config: Any, path: str) -> dict[str, float]:
    """The mask as it was, on a share of the rows: without reading the file, without writing a store."""
    rows = conversations(config, path)
    some = rows[: max(1, len(rows) // 10)]
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    begun = Clock()
    tokens = sum(old_mask.num_tokens(tokenizer, row, stop) for row in some)
    return {**begun.seconds(), "rows": len(some), "tokens": tokens}


def conversations(config: Any, path: str) -> list[Any]:
    with Path(path).open() as file:
        return [config.conversation(json.loads(line)) for line in file]


class Clock:
    def __init__(self) -> None:
        self.start = self._now()

    def seconds(self) -> dict[str, float]:
        """Since the start: of the wall's clock, and of the processor's time, that of ended workers included."""
        wall, cpu = self._now()
        return {"wall": wall - self.start[0], "cpu": cpu - self.start[1]}

    @staticmethod
    def _now() -> tuple[float, float]:
        workers = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.perf_counter(), time.process_time() + workers.ru_utime + workers.ru_stime


if __name__ == "__main__":
    main()
