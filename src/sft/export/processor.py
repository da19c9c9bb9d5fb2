"""The files by which a vision-language model reads other things than text: they are copied beside an export."""

import shutil
from pathlib import Path

from transformers.utils.hub import cached_file

from sft.model.loading import ModelSource

NAMES = (
    "processor_config.json",
    "preprocessor_config.json",
    "image_preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    "chat_template.json",  # an old name; a tokenizer's own template is in another file
)


def copy_files(source: ModelSource, folder: Path) -> None:
    """Copies those of the base model, if it has them, beside its exported weights."""
    if source.init != "pretrained" or source.base is None:
        return
    local = Path(source.base).expanduser()
    for name in NAMES:
        if (folder / name).exists() or (name.startswith("chat") and (folder / "chat_template.jinja").exists()):
            continue
        found = local / name if local.is_dir() else _of_hub(source.base, name, source.base_revision)
        if found and Path(found).is_file():
            shutil.copyfile(found, folder / name)


def _of_hub(name: str, file: str, revision: str | None) -> str | None:
    return cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
