"""A program for test_store.py: FILE CACHE NUM_WORKERS SECONDS_PER_ROW. Says "ready", waits for a line, builds
the store of FILE and says its key."""

import sys
import time
from typing import Any

from conftest import data_config, word_tokenizer
from sft.data import build, staging
from sft.data.conversation import Conversation, Empty, prompt_response
from sft.data.rows import Source


def slow(row: Any) -> Conversation | Empty:
    time.sleep(float(sys.argv[4]))
    return prompt_response(row, chat=False)


if __name__ == "__main__":
    build.NUM_ROWS_WORTH_WORKERS = 1000  # whatever it is worth, the workers are to be seen
    staging.SAVE_EVERY = 0.1
    print("ready", flush=True)
    sys.stdin.readline()
    config = data_config(
        conversation=slow, max_length=100, cache_dir=sys.argv[2], num_workers=int(sys.argv[3]), max_lost=1.0
    )
    store = config.store([Source(sys.argv[1])], word_tokenizer(), log=lambda line: print(line, file=sys.stderr))
    print(store.fingerprint)
