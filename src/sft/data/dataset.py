"""The settings of `conf/data/*.yaml`, and the training and validation samples that they give."""

import errno
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sft.data import ledger, splits
from sft.data.build import build_store
from sft.data.conversation import RowFunction
from sft.data.fingerprint import data_fingerprint, mask_fingerprint, remembered
from sft.data.ledger import Ledger
from sft.data.mask import Tokenization
from sft.data.rows import Source
from sft.data.step_plan import split_held_out
from sft.data.store import REBUILD, Store
from sft.errors import FULL_DISK, UserError
from sft.runs import manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2  # of a store's files; part of its key
# The disk is full, the folder is not ours, or something is in the way.
UNWRITABLE = (*FULL_DISK, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR)


@dataclass(frozen=True)
class Datasets:
    """`val` is None where validation is off. `ledger` and `fingerprint` are those of the stores, by split."""

    train: Store
    val: Store | None
    ledger: Ledger
    fingerprint: Mapping[str, str]
    val_sets: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)  # the samples of each that has a name


@dataclass(frozen=True)
class DataConfig:
    """Where rows come from, what a row is, and how it becomes samples: conf/data/base.yaml says what each setting means
    and its default. Lengths in tokens."""

    conversation: RowFunction
    path: str | list[str] | None  # several are concatenated
    name: str | None
    split: str
    val_path: str | list[str] | dict[str, str | list[str]] | None  # a mapping: of several sets' names
    val_split: str | None
    val_size: float
    max_length: int
    supervise: str
    overlong: str
    max_lost: float
    packing: bool
    num_workers: int
    cache_dir: str
    # Runs begun before these settings existed lack them.
    train_on: str = "all"
    train_reasoning: bool = True
    train_tool_calls: bool = True
    special_text: str | None = None
    sample_by: str = "line"

    def __post_init__(self) -> None:
        function = self.conversation
        if isinstance(function, partial):  # Hydra's, which takes a tenth of a millisecond to check each call
            object.__setattr__(self, "conversation", partial(function.func, *function.args, **function.keywords))

    def sources(self) -> tuple[list[Source], list[Source]]:
        """The sources of training and of validation; the latter empty if validation samples are held out, or off.
        UserError if validation would be on rows of training."""
        train = _sources(self.path, self.name, self.split, self.sample_by)
        if self.val_path is None and self.val_split is None:
            return train, []
        val_path = self.path if self.val_path is None else self.val_path
        paths = list(val_path.values()) if isinstance(val_path, dict) else [val_path]
        split = self.val_split or self.split
        val = [source for path in paths for source in _sources(path, self.name, split, self.sample_by)]
        splits.check(train, val, "data.val_split" if self.val_path is None else "data.val_path")
        return train, val

    def datasets(
        self,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        seed: int,
        template: Mapping[str, object] | None = None,
        wait: bool = False,
        log: Callable[[str], None],
    ) -> Datasets:
        """Builds or opens the token stores. `template`: arguments of the chat template. With `wait` another process
        builds them."""
        train_sources, val_sources = self.sources()
        train = self.store(train_sources, tokenizer, template=template, wait=wait, log=log)
        val = None
        val_sets: dict[str, NDArray[np.int64]] = {}
        counts: Ledger = {"train": {"sources": train.counts}}
        fingerprint = {"train": train.data_fingerprint}
        if val_sources:
            splits.check_ranges(train_sources, val_sources, Path(self.cache_dir))
            val = self.store(val_sources, tokenizer, template=template, wait=wait, log=log)
            counts["validation"], fingerprint["validation"] = {"sources": val.counts}, val.data_fingerprint
            if isinstance(self.val_path, dict):
                val_sets = _sets(self.val_path, val)
                counts["validation"]["sets"] = {name: len(samples) for name, samples in val_sets.items()}
            if in_both := splits.num_in_both(train.content, val.content):
                counts["validation"]["also_in_training"] = in_both
                log(f"{in_both:,} of {len(val):,} validation samples are also in training")
        elif self.val_size:
            kept, held_out = split_held_out(train.content, self.val_size, seed)
            counts["held_out"] = {"samples": len(held_out), "of": "train"}
            train, val = train.subset(kept), train.subset(held_out)
        return Datasets(train, val, counts, fingerprint, val_sets)

    def store(
        self,
        sources: list[Source],
        tokenizer: "PreTrainedTokenizerFast",
        *,
        template: Mapping[str, object] | None = None,
        wait: bool = False,
        log: Callable[[str], None],
    ) -> Store:
        """The token store of some sources under these settings, built in `num_workers` processes if it doesn't exist.

        With `wait` (all ranks but one) another process builds it. UserError for rows that cannot be read, if more than
        the share `max_lost` of them lost a sample, and if nothing is left to train on.
        """
        tokenization = Tokenization(
            tokenizer,
            supervise=self.supervise,
            max_length=self.max_length,
            overlong=self.overlong,
            train_on=self.train_on,
            train_reasoning=self.train_reasoning,
            train_tool_calls=self.train_tool_calls,
            special_text=self.special_text,
            template=template or {},
        )
        cache_dir = Path(self.cache_dir)
        data = [data_fingerprint(source, cache_dir) for source in sources]
        mask = mask_fingerprint(tokenization, self.conversation)
        key = hashlib.sha256(json.dumps([FORMAT, data, mask]).encode()).hexdigest()
        folder = cache_dir / "stores" / key
        if not folder.exists() and wait:
            wait_until(folder.exists, log)
        elif not folder.exists():
            meta = {"data_fingerprint": hashlib.sha256("".join(data).encode()).hexdigest()}
            try:
                build_store(
                    folder,
                    meta,
                    sources,
                    self.conversation,
                    tokenization,
                    self.num_workers,
                    log,
                    cache_dir=cache_dir,
                    stop_early=self.max_lost < 1,
                )
            except OSError as error:
                if error.errno not in UNWRITABLE:
                    raise
                raise UserError(
                    f"{cache_dir}: the token store cannot be written ({error.strerror or error}): make room or set "
                    "data.cache_dir to another folder"
                ) from error
        store = Store(folder, sources)
        if not wait:  # the first rank: the others have the same files
            _compare(folder, cache_dir / "fingerprints")
        ledger.check(store.counts, self.max_lost, self.overlong)  # on opening too: max_lost is no part of the key
        return store


def _compare(folder: Path, memo_dir: Path) -> None:
    """Damaged where a checksum of the store's files is another; a file is read once while it is unchanged."""
    advice = REBUILD.format(folder)
    for name, expected in (manifest.read(folder, advice) or {}).items():
        path = folder / name

        def checksum(path: Path = path) -> str:
            return manifest.entry(path)["xxh3_128"]

        if remembered(path, memo_dir, checksum) != expected["xxh3_128"]:
            raise manifest.Damaged(f"{path} is damaged (its checksum is another)", advice)


def _sources(paths: str | list[str] | None, name: str | None, split: str, sample_by: str) -> list[Source]:
    if not paths:
        raise UserError("no data is named: set data.path to a file, a folder or a Hub data set")
    return [Source(path, split, name, sample_by) for path in ([paths] if isinstance(paths, str) else paths)]


def _sets(paths: Mapping[str, str | list[str]], store: Store) -> dict[str, NDArray[np.int64]]:
    """The samples of each validation set, by number; its sources follow each other as the paths do."""
    sets, first = {}, 0
    for name, path in paths.items():
        last = first + (1 if isinstance(path, str) else len(path))
        sets[name] = np.flatnonzero((store.source_numbers >= first) & (store.source_numbers < last))
        if not len(sets[name]):
            raise UserError(
                f"data.val_path.{name}={path}: no row of it gives a sample: name other rows, or leave it out"
            )
        first = last
    return sets


def wait_until(there: Callable[[], object], log: Callable[[str], None]) -> None:
    """Waits for what rank 0 leaves when the token store is built."""
    started = time.monotonic()
    next_line = 30.0
    while not there():
        time.sleep(0.2)
        if (waited := time.monotonic() - started) > next_line:
            log(f"waiting {waited:.0f} s for the token store that rank 0 builds")
            next_line += 30.0
