"""Which of transformers' classes loads a checkpoint as what it is: by the architecture that its configuration names.

A vision-language checkpoint is loaded whole, so that it is exported as one; a configuration that names none is loaded
as a causal language model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def auto_class(config: "PretrainedConfig") -> Any:
    """The auto class whose `from_pretrained` and `from_config` make the model of a configuration."""
    import transformers

    # The order decides where several know the configuration and none the architecture.
    names = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    kinds = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    of_its_own = getattr(config, "auto_map", None) or {}  # code beside the weights
    for kind in kinds:
        if kind.__name__ in of_its_own:
            return kind
    knowing = [kind for kind in kinds if type(config) in kind._model_mapping]
    named = set(getattr(config, "architectures", None) or ())
    for kind in knowing:
        classes = kind._model_mapping[type(config)]
        if named & {one.__name__ for one in (classes if isinstance(classes, tuple | list) else [classes])}:
            return kind
    return (knowing or kinds)[0]


def of_folder(folder: str, **options: Any) -> Any:
    """The same of a folder or Hub name; `options` are those of `AutoConfig.from_pretrained`."""
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(folder, **options))
