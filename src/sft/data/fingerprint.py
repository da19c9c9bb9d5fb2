"""What a token store is made from, in 64 hexadecimal digits each: the data, and all that turns it into tokens."""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path

from sft.data import hub, mask
from sft.data.conversation import RowFunction
from sft.data.files import Source, kind, local_files
from sft.errors import UserError

# All code from a row to its samples; what comes after them decides nothing here.
MASK_CODE = sorted(
    file for file in Path(__file__).parent.glob("*.py") if file.stem not in ("batch", "packing", "step_plan", "prompt")
)
RACY_SECONDS = 2.0  # of modification times, on the coarsest file systems


def data_fingerprint(source: Source, cache_dir: Path) -> str:
    """sha256 of the split's name and of the source's files, names and bytes; for a Hub data set, of the fingerprint
    that `datasets` gives it. Hashes of files are kept under `cache_dir`."""
    digest = hashlib.sha256(source.split.encode())
    files = local_files(source)
    if files is None:
        digest.update(hub.fingerprint(source, cache_dir).encode())
    elif source.sample_by != "line" and any(kind(file) == "text" for file in files):
        digest.update(source.sample_by.encode())
    for file in files or ():
        try:
            digest.update(f"\n{file.name} {_file_hash(file, cache_dir / 'fingerprints')}".encode())
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()


def _file_hash(file: Path, memo_dir: Path) -> str:
    """sha256 of a file."""

    def compute() -> str:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return remembered(file, memo_dir, compute)


def remembered(file: Path, memo_dir: Path, compute: Callable[[], str]) -> str:
    """What `compute` says of a file, a hash; asked once while its size, times and inode stay. Whoever sets the
    modification time back moves the time of the last change."""
    stat = file.stat()
    state = f"{stat.st_size}\n{stat.st_mtime_ns}\n{stat.st_ctime_ns}\n{stat.st_ino}"
    memo = memo_dir / hashlib.sha256(f"{file.resolve()}\n{state}".encode()).hexdigest()
    try:
        known, _, seal = memo.read_text().partition(" ")
        if seal == _seal(known):  # else another rank is writing it, or it is damaged
            return known
    except (OSError, UnicodeDecodeError):
        pass
    digest = compute()
    # A file changed a moment ago may change again within the same tick of its clock ("racily clean", in git's words).
    if time.time() - max(stat.st_mtime, stat.st_ctime) > RACY_SECONDS:
        with suppress(OSError):  # a store in a read-only cache can still be opened
            memo_dir.mkdir(parents=True, exist_ok=True)
            memo.write_text(f"{digest} {_seal(digest)}")
    return digest


def _seal(digest: str) -> str:
    return hashlib.sha256(digest.encode()).hexdigest()[:16]


def mask_fingerprint(tokenization: mask.Tokenization, row_function: RowFunction) -> str:
    """sha256 of all that decides the samples of a given row: tokenizer, template, settings, the row function with its
    arguments, and the source code of both, so that an edit of the code is noticed."""
    tokenizer = tokenization.tokenizer
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # earlier calls leave this state behind, and none of ours uses it
    backend.no_padding()
    bound = row_function if isinstance(row_function, partial) else partial(row_function)
    settings = {
        "template": tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "settings": {
            each.name: getattr(tokenization, each.name) for each in fields(tokenization) if each.name != "tokenizer"
        },
        "function": f"{bound.func.__module__}.{bound.func.__qualname__}",
        "arguments": [bound.args, bound.keywords],
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=_plain).encode())
    digest.update(backend.to_str().encode())
    for file in (*MASK_CODE, Path(inspect.getfile(bound.func))):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _plain(value: object) -> object:
    """A configuration's own mappings and lists → plain ones, as JSON needs; anything else by its text."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, Iterable) else str(value)
