"""What a run's model, tokenizer and chat template are, so that none of them changes while the run is away.

Of a folder, each file counts by its whole content: no change goes unseen. The hashes are kept in data.cache_dir by
path, size, times and inode, so a file is read once, in blocks by several threads, as fast as the disk gives it. Of a
Hub name the commit counts.

A run of full fine-tuning that resumes has all of its weights in the checkpoint: the base's aren't compared, and may be
gone. An adapter is what it is only beside its base's weights.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from sft.data.fingerprint import remembered
from sft.errors import UserError
from sft.model.loading import ModelSource

# In each part the first patterns that some file matches.
FILES = {
    "weights": (("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json")),
    "configuration": (("config.json", "adapter_config.json", "*.py"),),
    "tokenizer": (("token*.json", "tokenizer.model", "vocab.*", "merges.txt", "special_tokens_map.json"),),
}
BLOCK = 2**28  # bytes that a thread hashes at a time
NUM_THREADS = 8

Fingerprint = dict[str, dict[str, str]]  # weights, configuration, tokenizer, template → file or Hub name → its hash


def fingerprint(
    source: ModelSource, cache_dir: Path, *, weights: bool = True, template: str | None = None
) -> Fingerprint:
    """Of the model's files, or all but its weights; and of tokenizer and chat template, where that is given."""
    places = [("weights", place) for place in source.places()] if weights else []
    places += [("configuration", place) for place in source.places()]
    found: Fingerprint = {}
    if template is not None:
        places.append(("tokenizer", source.tokenizer_place()))
        found["template"] = of_template(template)
    for part, (name, revision) in places:
        found.setdefault(part, {}).update(_of(part, name, revision, cache_dir / "fingerprints"))
    return found


def of_template(template: str) -> dict[str, str]:
    """Of the chat template's text."""
    return {"the chat template": hashlib.sha256(template.encode()).hexdigest()}


def commit(name: str, revision: str | None) -> str | None:
    """The commit of a Hub name's files in the cache."""
    for file in ("config.json", "adapter_config.json", "tokenizer_config.json", "tokenizer.json"):
        if isinstance(path := try_to_load_from_cache(name, file, revision=revision or "main"), str):
            return Path(path).parent.name
    return None


def _of(part: str, name: str, revision: str | None, memo_dir: Path) -> dict[str, str]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        return {name: known} if (known := commit(name, revision)) else {}
    for patterns in FILES[part]:
        if files := sorted({path for pattern in patterns for path in folder.glob(pattern)}):
            try:
                return {str(file): _file_hash(file, memo_dir) for file in files}
            except OSError as error:
                raise UserError(f"{folder}: its files can't be read ({error})") from error
    return {}


def _file_hash(file: Path, memo_dir: Path) -> str:
    """sha256 of the sha256s of a file's blocks."""

    def of_block(start: int) -> bytes:
        digest, left = hashlib.sha256(), BLOCK
        with file.open("rb", buffering=0) as stream:
            stream.seek(start)
            while left and (data := stream.read(min(left, 2**22))):
                digest.update(data)
                left -= len(data)
        return digest.digest()

    def compute() -> str:
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            return hashlib.sha256(b"".join(pool.map(of_block, range(0, file.stat().st_size, BLOCK)))).hexdigest()

    return remembered(file, memo_dir, compute)
