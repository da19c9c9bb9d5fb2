"""A model and its tokenizer, by folder or Hub name, checked against each other before any weight is read."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.clock import check_arguments
from sft.errors import UserError
from sft.model import tokenizer as tokenizer_files
from sft.model.adapter import Adapter, check_whole, quantization
from sft.model.begun import Begun
from sft.model.language_part import freeze_rest, has_rest
from sft.model.loading_errors import loading
from sft.model.model_class import auto_class
from sft.model.parameters import Parameters
from sft.model.source_files import check_folder, check_model
from sft.model.trained_tokens import token_ids

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from sft.checkpoint.layout import Read
    from sft.model.sharded_loading import Sharding


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """The settings of `conf/model/*.yaml`, which explains each; nothing is loaded until a method is called."""

    path: str | None
    revision: str | None
    tokenizer: str | None
    chat_template: str | None
    init: str  # pretrained | random (from `config` alone, the weights drawn from the seed)
    config: dict[str, object]
    attention: str
    gradient_checkpointing: bool
    activation_offload: bool
    trust_remote_code: bool
    # Runs begun before these settings existed lack them.
    isolate: str = "auto"  # auto | packed | apart
    compile: bool = False
    neftune_alpha: float = 0.0  # of noise on the input embeddings in training; 0: none
    template: Mapping[str, object] = field(default_factory=dict)  # arguments of the chat template, and `today`
    new_weights: list[str] | None = None  # glob patterns of weights that may be missing, and are then drawn at random
    add_tokens: list[str] | None = None  # texts that become tokens of their own
    adapter: Adapter | None = None  # of conf/adapter/*.yaml; None: every weight is trained
    parameters: Parameters = field(default_factory=Parameters)  # of conf/train.yaml

    def __post_init__(self) -> None:
        if self.init == "pretrained" and not self.path:
            raise UserError("no model is named: set model.path to a folder or a Hub name, e.g. Qwen/Qwen3-0.6B")
        if self.init == "random" and not self.tokenizer:
            raise UserError("model.init=random needs model.tokenizer: a folder or a Hub name")
        if self.init == "random" and self.adapter:
            raise UserError("model.init=random leaves an adapter nothing to adapt: set adapter=none, or model.path")
        if self.parameters.freezes and self.adapter:
            raise UserError(
                "parameters.train and parameters.freeze: beside an adapter the whole model is frozen: choose the "
                "layers that it adapts with adapter.target_modules"
            )
        if self.parameters.freezes and self.init == "random":
            raise UserError(
                "parameters.train and parameters.freeze: with model.init=random frozen weights would be in no file: "
                "set model.path"
            )
        if self.new_weights and self.adapter:
            raise UserError(
                "model.new_weights draws weights at random, and an adapter leaves them as they are: set adapter=none"
            )

        trains_rows = self.adapter and (self.adapter.modules_to_save or self.adapter.trainable_tokens)
        if self.add_tokens and self.adapter and not (trains_rows and self.adapter.merge):
            raise UserError(
                "model.add_tokens: an adapter leaves the rows of new tokens at the mean of the others, and its base "
                "has none: name them in adapter.trainable_tokens too, with adapter.merge=true, or set adapter=none"
            )
        if self.adapter and self.adapter.begun is None and self.begun is not None:
            object.__setattr__(self, "adapter", self.adapter.continuing(self.begun))

    @cached_property
    def begun(self) -> "Begun | None":
        """The LoRA adapter that `path` is, if it is one: with `adapter` its training is continued, without it is merged
        into its base before all weights are trained."""
        return Begun.at(self.path, self.revision) if self.path and self.init == "pretrained" else None

    @property
    def base(self) -> str | None:
        """Folder or Hub name of the model itself: `path`, or the base of the adapter that it holds."""
        return self.begun.base if self.begun else self.path

    @property
    def base_revision(self) -> str | None:
        return self.begun.base_revision if self.begun else self.revision

    def places(self) -> list[tuple[str, str | None]]:
        """Folder or Hub name, with its revision, of all that the model is read from."""
        own = [(self.path, self.revision), *([(self.base, self.base_revision)] if self.begun else [])]
        return [(place, revision) for place, revision in own if place and self.init == "pretrained"]

    def tokenizer_place(self) -> tuple[str, str | None]:
        """The same of the tokenizer: an adapter's folder may have one of its own, or leave it to the base's."""
        if not self.tokenizer and self.begun and not tokenizer_files.is_there(str(self.path)):
            return str(self.base), self.base_revision
        return str(self.tokenizer or self.path), self.revision

    def check_files(self) -> None:
        """Refuses folders that hold no causal language model or no tokenizer; a Hub name isn't looked up."""
        for setting, source in (("model.path", self.path), ("model.tokenizer", self.tokenizer)):
            if source:
                check_folder(source, setting)
        if self.chat_template and not Path(self.chat_template).expanduser().is_file():
            raise UserError(f"model.chat_template={self.chat_template}: there is no such file (looked in {Path.cwd()})")
        if self.init != "pretrained" or not Path(self.path or "").expanduser().is_dir():
            tokenizer_files.check_files(str(self.tokenizer or self.path))
            return
        if self.begun:
            check_folder(self.begun.base, f"model.path={self.path} is an adapter, whose base_model_name_or_path")
        base = Path(str(self.base)).expanduser()
        if base.is_dir():
            check_model(base, self.path)
        tokenizer_files.check_files(self.tokenizer_place()[0])

    def load_tokenizer(self) -> "PreTrainedTokenizerFast":
        """The tokenizer, with the chat template of `chat_template` where one is given. UserError for one that can't be
        read, and for arguments in `template` that its chat template doesn't take."""
        from transformers import AddedToken, AutoTokenizer

        source, revision = self.tokenizer_place()
        check_folder(source, "model.tokenizer" if self.tokenizer else "model.path")
        tokenizer_files.check_files(source)
        with loading("tokenizer", source):
            loaded = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=self.trust_remote_code)
        tokenizer = tokenizer_files.check(loaded, source)
        if self.add_tokens:  # as text: an answer shows them, and special tokens would be left out of it
            tokenizer.add_tokens([AddedToken(text, normalized=False) for text in self.add_tokens])
        if self.chat_template:
            try:
                tokenizer.chat_template = Path(self.chat_template).expanduser().read_text()
            except OSError as error:
                raise UserError(f"model.chat_template={self.chat_template} can't be read: {error.strerror}") from error
        check_arguments(tokenizer.chat_template, self.template)
        return tokenizer

    @cached_property
    def new_ids(self) -> list[int]:
        """The ids of `add_tokens`, without those that the tokenizer has anyway."""
        if not self.add_tokens:
            return []
        had = replace(self, add_tokens=None).load_tokenizer().get_vocab()
        return sorted({*self.load_tokenizer().get_vocab().values()} - {*had.values()})

    @cached_property
    def trained_ids(self) -> list[int]:
        """The ids of the adapter's `trainable_tokens`. UserError for a text that isn't exactly one token."""
        texts = self.adapter.trainable_tokens if self.adapter else None
        return token_ids(texts, self.load_tokenizer()) if texts else []

    def load_config(self) -> "PretrainedConfig":
        """The model's configuration with the overrides of `config`, which must be fields that it has, and with rows for
        new tokens."""
        config = self._own_config()
        with self._reading(config):
            text_config = config.get_text_config()
            num_tokens = text_config.vocab_size
        if self.new_ids and self.new_ids[-1] >= num_tokens:
            from sft.model.vocabulary import MULTIPLE

            text_config.vocab_size = -(-(self.new_ids[-1] + 1) // MULTIPLE) * MULTIPLE
        return config

    def _own_config(self) -> "PretrainedConfig":
        from transformers import AutoConfig

        if self.init == "random":
            fields = dict(self.config)
            with loading("model", "of model.config"):
                config = AutoConfig.for_model(str(fields.pop("model_type", "llama")), **fields)
                more = has_rest(config)
            if more:
                raise UserError(
                    f"model.init=random: {config.model_type} has more parts than its language part, and frozen weights "
                    f"would be in no file: set model.config.model_type={config.get_text_config().model_type}"
                )
            return config
        assert self.path is not None and self.base is not None
        check_folder(self.base, "model.path")
        with loading("model", self.path):
            config = AutoConfig.from_pretrained(
                self.base, revision=self.base_revision, trust_remote_code=self.trust_remote_code
            )
        for name, value in self.config.items():
            having = [part for part in (config, config.get_text_config()) if hasattr(part, name)]
            if not having:
                raise UserError(f"model.config.{name} is no field of {type(config).__name__} ({self.path})")
            with self._reading(config):  # some check their values
                for part in having:
                    setattr(part, name, value)
        return config

    def check(self, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> "PretrainedConfig":
        """The configuration, or a `UserError` where tokenizer, length or trained tokens don't fit the model."""
        if self.adapter and self.adapter.trainable_tokens:
            token_ids(self.adapter.trainable_tokens, tokenizer)
        config = self.load_config()
        text_config = config.get_text_config()
        num_embeddings = text_config.vocab_size
        largest = max(tokenizer.get_vocab().values())
        if largest >= num_embeddings:
            raise UserError(
                f"the tokenizer {self.tokenizer or self.path} has token ids up to {largest}, the model "
                f"{self.path or '(random)'} only {num_embeddings} embeddings: "
                "set model.tokenizer to the one that the model was trained with"
            )
        longest = getattr(text_config, "max_position_embeddings", None)
        if longest and max_length > longest:
            raise UserError(
                f"data.max_length={max_length} is more than the {longest} positions of "
                f"{self.path or 'the model'}: set data.max_length={longest} or less"
            )
        return config

    def _reading(self, config: "PretrainedConfig") -> AbstractContextManager[None]:
        """Whatever transformers raises of this model becomes a UserError."""
        kinds = ", ".join(config.architectures or ()) or type(config).__name__
        return loading("model", self.path or "(random)", kinds)

    def check_weights(self, download: bool = True) -> list[str]:
        """The weights that the model's files lack, all of which `new_weights` allows. UserError for others, for weights
        of another shape, and for two different ones that should be one.

        Only the files' headers are read. The answer is empty for files of another format than safetensors, for
        quantized ones and, without `download`, for those of a Hub name that aren't here: `load` checks those.
        """
        from sft.model import missing
        from sft.model.sharded_loading import weight_files

        config = self._own_config()
        if self.init != "pretrained" or getattr(config, "quantization_config", None):
            return []
        assert self.base is not None
        with self._reading(config):
            if not (files := weight_files(self.base, self.base_revision, download)):
                return []
            empty = self.empty(config)
            new = missing.check(missing.of_files(empty, files), empty, self.base, self.new_weights or ())
            missing.check_ties(empty, files, self.base)
            return new

    def empty(self, config: "PretrainedConfig", dtype: "torch.dtype | None" = None) -> "PreTrainedModel":
        """The model without its weights: names, shapes and layers."""
        import torch

        options: dict[str, Any] = {"dtype": dtype} if dtype else {}
        with self._reading(config), torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code, **options)

    def _attending(self, config: "PretrainedConfig", make: Callable[..., "PreTrainedModel"]) -> "PreTrainedModel":
        """A model made with the attention that is asked for. Families that choose their layers by its name know none
        but their own, which they get where the choice is left to this project."""
        from sft.model import attention

        asked = attention.asked(self.attention)
        try:
            return make(attn_implementation=asked)
        except (UserError, OSError):
            raise
        except Exception as error:  # whatever the family raises; a fault of another kind comes again
            if self.attention == "auto":
                return make(attn_implementation=None)
            self.empty(config)  # by its own attention: the fault, if it is another
            message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
            raise UserError(
                f"model.attention={self.attention} isn't for {type(config).__name__} ({message}): set "
                "model.attention=auto"
            ) from error

    def keeps_base(self, config: "PretrainedConfig") -> bool:
        """Whether some of the model's weights aren't trained, so that a checkpoint leaves them to the base's files."""
        if self.adapter is not None or self.parameters.freezes:
            return True
        empty = self.empty(config)
        freeze_rest(empty)  # some models freeze some of their own
        return not all(parameter.requires_grad for parameter in empty.parameters())

    def load(
        self,
        dtype: "torch.dtype",
        weights: bool = True,
        sharding: "Sharding | None" = None,
        keep: "Callable[[Read], object] | None" = None,
    ) -> "PreTrainedModel":
        """The model in training mode; `weights=False` leaves them undefined, to be filled from a checkpoint.

        With an adapter, only the adapter is trainable; weights that aren't trained are always read from `path`. With
        `sharding`, each rank holds its part of the parameters plus the tensor being read. `keep` is called with what
        reads the first values of the trainable weights in fp32, for a strategy that rounds the model's. UserError for
        weights that its files lack and `new_weights` doesn't allow; those that it does are drawn from torch's last
        seed.
        """
        import torch
        from accelerate import init_empty_weights

        from sft.model import experts, missing
        from sft.model.sharded_loading import first_values, load_sharded
        from sft.model.vocabulary import Growth

        config = self.load_config()
        stored_config = self._own_config()
        weights_wanted = weights or self.keeps_base(config)
        new = self.check_weights() if weights_wanted else []
        empty = self.empty(stored_config) if new or self.new_ids else None
        drawn = {name: partial(missing.drawn, empty, name) for name in new} if empty else {}
        growth = Growth.of(empty, self.empty(config), self.new_ids) if empty and self.new_ids else None
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code, "dtype": dtype}
        if self.adapter and sharding is not None:
            check_whole(self.adapter.use_dora, self.adapter.trainable_tokens)
        if self.adapter and self.adapter.quantize:
            if sharding is not None:
                raise UserError(
                    "adapter=qlora: this strategy shards weights, which 4 bits don't allow: set strategy=ddp"
                )
            options |= quantization()
        path = self.base if self.init == "pretrained" else None
        merges = self.begun is not None and self.adapter is None
        kind = auto_class(config)
        first: Read | None = None  # what reads the weights, where they were read by range

        def load_whole() -> "PreTrainedModel":
            if path is None:
                return self._attending(config, lambda **how: kind.from_config(config, **options, **how))
            reporting: dict[str, Any] = {"ignore_mismatched_sizes": True, "output_loading_info": True}
            loaded: Any = self._attending(
                stored_config,
                lambda **how: kind.from_pretrained(
                    path, config=stored_config, revision=self.base_revision, **options, **reporting, **how
                ),
            )
            whole, info = loaded
            lacking = missing.check(info, whole, path, self.new_weights or ())
            with torch.no_grad():
                for name, parameter in whole.named_parameters() if lacking else ():
                    if name in lacking:
                        parameter.copy_(missing.drawn(empty or self.empty(stored_config), name))
            if self.begun and merges:
                whole = self.begun.merge(whole)
            if growth:
                growth.apply(whole)
            return whole

        with self._reading(config), missing.without_report():
            if sharding is not None or not weights_wanted:
                with init_empty_weights():  # parameters only: buffers such as RoPE's frequencies keep their values
                    model = self._attending(config, lambda **how: kind.from_config(config, **options, **how))
                model.tie_weights()
                first = load_sharded(
                    model,
                    load_whole,
                    path=None if merges else path,  # a merged weight is in no file
                    revision=self.base_revision,
                    adapter=self.adapter,
                    weights=weights_wanted,
                    sharding=sharding,
                    parameters=self.parameters,
                    drawn=drawn,
                    growth=growth,
                )
            else:
                model = load_whole()
                self.parameters.choose(model)
        experts.group(model)
        if self.adapter and sharding is None:
            self.adapter.add(model, self.trained_ids)
        if self.adapter and growth:
            growth.check_trained(model, self.trained_ids)
        if keep and (weights or self.adapter):
            unchanged = not (merges or new or growth)  # as they are in the files
            keep(first or first_values(model, path if unchanged else None, self.base_revision))
        if self.gradient_checkpointing:
            # The first of the two names is new in transformers 5.2x and warns of the second.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            try:
                enable({"use_reentrant": False})
            except ValueError as error:
                raise UserError(
                    f"{type(model).__name__} has no gradient checkpointing: set model.gradient_checkpointing=false"
                ) from error
        if self.compile:
            # A graph for all layers, of any number of tokens: packs have as many as they have.
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
        # from_pretrained leaves it in eval mode, where dropout and gradient checkpointing are off.
        return model.train()


def decoder_layers(model: "nn.Module") -> "list[nn.Module]":
    """The layers that the model is made of, as transformers names them for sharding."""
    kinds = set(getattr(model, "_no_split_modules", None) or [])
    # Of a layer that FSDP2 has sharded, the class is a subclass made for it.
    return [module for module in model.modules() if kinds & {kind.__name__ for kind in type(module).__mro__}]
