"""A split is what it says: validation rows are none of training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.data.files import Source, base_splits, is_single_file, local_files
from sft.data.rows import ranges
from sft.errors import UserError

ADVICE = (
    "set data.val_path to a file of other rows, or data.val_path=null data.val_split=null to hold out data.val_size of "
    "the samples"
)


def check(training: Sequence[Source], validation: Sequence[Source], setting: str) -> None:
    """UserError if a validation source is one of training, under another split's name or none."""
    for held in validation:
        for source in training:
            if not _same_files(source, held) or _are_slices(source, held):
                continue
            if is_single_file(held) and setting == "data.val_split" and held.split != source.split:
                raise UserError(
                    f"data.val_split={held.split}: {held.path} is a single file, which has no split of that name, so "
                    f"validation would be on the training rows: {ADVICE}"
                )
            raise UserError(f"{setting}: {held} is validation and training at once: {ADVICE}")


def check_ranges(training: Sequence[Source], validation: Sequence[Source], cache_dir: Path) -> None:
    """UserError if slices of the same files overlap. May count the files' rows."""
    for held in validation:
        for source in training:
            if not (_same_files(source, held) and _are_slices(source, held)):
                continue
            for split, begin, end in ranges(source, cache_dir):
                for other, from_, to in ranges(held, cache_dir):
                    if split == other and max(begin, from_) < min(end, to):
                        raise UserError(
                            f"data.split={source.split} and data.val_split={held.split} share rows of {source.path}: "
                            "write slices that don't overlap, such as train[:90%] and train[90%:]"
                        )


def num_in_both(training: NDArray[np.uint64], validation: NDArray[np.uint64]) -> int:
    """The number of validation samples whose row, by the hashes of both [num_samples], is also one of training."""
    return int(np.isin(validation, training).sum())


def _same_files(source: Source, other: Source) -> bool:
    """Whether the sources have a file in common, or are splits of the same name of one Hub data set."""
    files, others = local_files(source), local_files(other)
    if files is None or others is None:
        same = (source.path, source.name) == (other.path, other.name)
        return files is None and others is None and same and bool(_bases(source) & _bases(other))
    return bool({file.resolve() for file in files} & {file.resolve() for file in others})


def _are_slices(source: Source, other: Source) -> bool:
    """Whether both name rows of the same split of the same path, which may be different ones."""
    return (
        Path(source.path).expanduser().resolve() == Path(other.path).expanduser().resolve()
        and _bases(source) == _bases(other)
        and ("[" in source.split or "[" in other.split)
    )


def _bases(source: Source) -> set[str]:
    return set(base_splits(source.split))
