"""A LoRA adapter that was begun elsewhere, as peft stores it: continued, or merged into its base."""

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import UserError
from sft.model.adapter import stored_name

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Begun:
    """A LoRA adapter on disk, as peft stores it."""

    folder: str
    settings: dict[str, Any]  # adapter_config.json

    @classmethod
    def at(cls, path: str, revision: str | None) -> "Begun | None":
        """The adapter of a folder or Hub name; None where there is none. UserError for one that isn't trained here."""
        folder = Path(path).expanduser()
        if folder.is_dir():
            file = folder / "adapter_config.json"
        elif path.startswith((".", "/", "~")) or path.count("/") > 1:
            return None  # no Hub name
        else:
            from transformers.utils.hub import cached_file

            found = cached_file(
                path,
                "adapter_config.json",
                revision=revision,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            file = Path(found or "")
            if found:
                cached_file(path, "adapter_model.safetensors", revision=revision)
        if not file.is_file():
            return None
        try:
            settings = json.loads(file.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} can't be read: {error}") from error
        if not isinstance(settings, dict):
            raise UserError(f"{file} can't be read: it holds no JSON object")
        where = f"model.path={path} is an adapter"
        if settings.get("peft_type") != "LORA":
            raise UserError(f"{where} of type {settings.get('peft_type')}, and only LoRA is trained here")
        if settings.get("init_lora_weights") not in (True, False, None, "gaussian", "orthogonal"):
            raise UserError(
                f"{where} begun with init_lora_weights={settings['init_lora_weights']}, which changes the base's "
                "weights: merge it by peft first, and name the merged model"
            )
        for name in ("modules_to_save", "trainable_token_indices"):
            if settings.get(name):
                raise UserError(f"{where} with {name}, which is not trained here: merge it by peft first")
        if settings.get("bias", "none") != "none":
            raise UserError(f"{where} with bias={settings['bias']}, which is not trained here: merge it by peft first")
        if not settings.get("base_model_name_or_path"):
            raise UserError(f"{where} that names no base: set base_model_name_or_path in its adapter_config.json")
        if not (file.parent / "adapter_model.safetensors").is_file():
            raise UserError(f"{where} without weights: there is no adapter_model.safetensors")
        return cls(str(file.parent), settings)

    @property
    def base(self) -> str:
        return str(self.settings["base_model_name_or_path"])

    @property
    def base_revision(self) -> str | None:
        return self.settings.get("revision")

    def weight(self, name: str) -> "Tensor":
        """A weight by its name in the model."""
        from safetensors import safe_open

        with safe_open(Path(self.folder) / "adapter_model.safetensors", "pt") as file:
            weight: Tensor = file.get_tensor(stored_name(name))
        return weight.float()

    def check(self, model: "PreTrainedModel") -> None:
        """Refuses an adapter whose weights aren't those that it has in this model."""
        from safetensors import safe_open

        with safe_open(Path(self.folder) / "adapter_model.safetensors", "pt") as file:
            stored = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        own = {stored_name(name): list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        if differing := sorted(key for key in own.keys() | stored.keys() if own.get(key) != stored.get(key)):
            raise UserError(
                f"the adapter {self.folder} doesn't fit its base {self.base}: {len(differing)} weights are missing, of "
                f"another shape or of no layer ({', '.join(differing[:3])})"
            )

    def merge(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """The model with the adapter merged into its weights, by peft."""
        from peft import PeftModel

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft explains how it treats some layers
            adapted = PeftModel.from_pretrained(model, self.folder, autocast_adapter_dtype=False)
            merged: PreTrainedModel = adapted.merge_and_unload()
        return merged.requires_grad_(True)
