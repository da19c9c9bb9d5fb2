"""What `conf/data/*.yaml` says of the data, and the training and validation samples that come of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sft.data.conversation import Conversation
from sft.data.mask import Tokenization
from sft.data.rows import Source
from sft.data.step_plan import split_held_out
from sft.data.store import Store, build_or_open
from sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Split:
    """Samples of a store, all of them or those at `indices`."""

    def __init__(self, store: Store, indices: np.ndarray | None = None) -> None:
        self.store = store
        self.indices = indices
        self.lengths = store.lengths if indices is None else store.lengths[indices]
        self.num_supervised = store.num_supervised if indices is None else store.num_supervised[indices]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.store[self._at(index)]

    def source(self, index: int) -> str:
        return self.store.source(self._at(index))

    def row(self, index: int) -> int:
        return self.store.row(self._at(index))

    def _at(self, index: int) -> int:
        return int(index if self.indices is None else self.indices[index])


@dataclass(frozen=True)
class Splits:
    """`val` is None where validation is off. `ledger` and `fingerprint` are those of the stores."""

    train: Split
    val: Split | None
    ledger: Mapping[str, Any]
    fingerprint: Mapping[str, str]


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from, what a row is, and what becomes of it. Lengths in tokens."""

    conversation: Callable[[Mapping[str, Any]], Conversation]  # row -> conversation
    path: str | list[str] | None = None  # file, folder, saved data set or Hub name; several are concatenated
    name: str | None = None  # Hub configuration
    split: str = "train"
    val_path: str | list[str] | None = None  # None: `path`
    val_split: str | None = None  # None: `split` of val_path, or, without val_path, `val_size` held out
    val_size: float = 0.05  # held out where nothing above names validation data; 0: no validation
    max_length: int = 2048  # of a sample, and of a pack
    supervise: str = "response"  # response | all
    overlong: str = "drop"  # drop | truncate_prompt | error
    max_lost: float = 0.05  # share of rows
    packing: bool = True
    num_workers: int = 1
    cache_dir: str = "cache"

    def __post_init__(self) -> None:
        for name, known in (
            ("supervise", ("response", "all")),
            ("overlong", ("drop", "truncate_prompt", "error")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"data.{name}={getattr(self, name)} is unknown: set {', '.join(known)}")
        for name, least in (("max_length", 2), ("num_workers", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"data.{name}={value} is not a whole number from {least} on")

    def sources(self) -> tuple[list[Source], list[Source]]:
        """Of training and of validation; none of validation where its samples are held out, or there are none."""
        train = _sources(self.path, self.name, self.split)
        if self.val_path is None and self.val_split is None:
            return train, []
        val_path = self.path if self.val_path is None else self.val_path
        return train, _sources(val_path, self.name, self.val_split or self.split)

    def prepare(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        seed: int,
        wait: bool = False,
        log: Callable[[str], None],
    ) -> Splits:
        """Builds or opens the token stores; `wait`: another process builds them."""
        train_sources, val_sources = self.sources()
        if not val_sources:
            train = self.store(train_sources, tokenizer, wait=wait, log=log)
            if not self.val_size:
                return Splits(Split(train), None, {"train": train.ledger}, {"train": train.data_fingerprint})
            kept, held_out = split_held_out(train.content, self.val_size, seed)
            ledger = {"train": train.ledger, "held_out": {"samples": len(held_out), "of": "train"}}
            return Splits(Split(train, kept), Split(train, held_out), ledger, {"train": train.data_fingerprint})
        train = self.store(train_sources, tokenizer, wait=wait, log=log)
        val = self.store(val_sources, tokenizer, wait=wait, log=log)
        return Splits(
            Split(train),
            Split(val),
            {"train": train.ledger, "validation": val.ledger},
            {"train": train.data_fingerprint, "validation": val.data_fingerprint},
        )

    def store(
        self,
        sources: list[Source],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        wait: bool = False,
        log: Callable[[str], None],
    ) -> Store:
        """The token store of some sources under these settings."""
        tokenization = Tokenization(
            tokenizer, supervise=self.supervise, max_length=self.max_length, overlong=self.overlong
        )
        return build_or_open(
            sources,
            self.conversation,
            tokenization,
            Path(self.cache_dir),
            num_workers=self.num_workers,
            max_lost=self.max_lost,
            wait=wait,
            log=log,
        )


def _sources(path: str | list[str] | None, name: str | None, split: str) -> list[Source]:
    if not path:
        raise UserError("no data is named: set data.path to a file, a folder or a Hub data set")
    return [Source(each, split, name) for each in ([path] if isinstance(path, str) else path)]
