"""Whether folders hold a model, before transformers is asked."""

import json
import re
from pathlib import Path

from sft.errors import UserError

# Architectures without a causal mask or a head over the vocabulary.
NOT_CAUSAL = re.compile(
    r"For(MaskedLM|PreTraining|\w*Classification|QuestionAnswering|MultipleChoice|NextSentencePrediction)$"
    r"|^(Bert|Roberta|XLMRoberta|DistilBert|Albert|Electra|Deberta|MPNet)\w*Model$"
)


def check_folder(source: str, setting: str) -> None:
    """A source that looks like a path must exist: never ask the Hub for a mistyped folder."""
    looks_local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_local and not Path(source).expanduser().is_dir():
        made = ": make demo trains it" if source.endswith("demo-base/export") else ""
        raise UserError(f"{setting}={source}: there is no such folder (looked in {Path.cwd()}){made}")


def check_model(folder: Path, path: str | None) -> None:
    """Refuses a folder that holds no causal language model; `path` as the setting names it."""
    if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise UserError(f"model.path={path} is a run's folder: set model.path={path}/export")
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={path}: the folder holds no model (config.json)")
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"model.path={path}: its config.json can't be read: {error}") from error
    kinds = config.get("architectures") or []
    if any(NOT_CAUSAL.search(kind) for kind in kinds) and not config.get("is_decoder"):
        raise UserError(
            f"model.path={path} is a {kinds[0]}, no causal language model: choose a model whose config.json "
            "names one, such as LlamaForCausalLM"
        )
    weights = [path for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern)]
    if not any("training_args" not in path.name for path in weights):
        raise UserError(f"model.path={path}: the folder holds no weights (model.safetensors)")
