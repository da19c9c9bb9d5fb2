"""Adds a low-rank adapter (LoRA, arXiv 2106.09685) to a model. Its layers are peft's."""

import importlib.util
import math
import re
import warnings
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sft.errors import UserError
from sft.model import language_part, trained_tokens
from sft.model.unadapted import left_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from sft.model.begun import Begun

NAME = "default"  # peft's own for an adapter that is the only one
TRAINED_WHOLE = f".modules_to_save.{NAME}."  # in the name of a weight of modules_to_save
MAGNITUDE = f".lora_magnitude_vector.{NAME}.weight"  # of DoRA, [number of outputs]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The settings of `conf/adapter/*.yaml`, which explains each.

    W x becomes W x + alpha / r · B A x; W is frozen, and B A of rank r is trained.
    """

    r: int
    alpha: int
    dropout: float
    target_modules: str | list[str]
    use_rslora: bool
    quantize: bool  # W in 4 bits (QLoRA, arXiv 2305.14314)
    merge: bool
    # Runs begun before these settings existed lack them.
    use_dora: bool = False  # the length of each of W's rows is trained by itself (DoRA, arXiv 2402.09353)
    init: str = "default"  # default | gaussian | orthogonal
    modules_to_save: list[str] | None = None  # modules that are trained whole, beside the adapter
    trainable_tokens: list[str] | None = None  # whose rows of embeddings and head are trained, beside the adapter
    begun: "Begun | None" = None  # the adapter that is continued

    def __post_init__(self) -> None:
        if self.init == "orthogonal" and self.r % 2:
            raise UserError(f"adapter.init=orthogonal needs an even adapter.r, and it is {self.r}")
        self.check_merge(self.merge, "adapter.merge")

    def check_merge(self, merge: bool, setting: str) -> None:
        """Refuses to merge an adapter into other weights than it was trained with."""
        if self.quantize and merge:
            raise UserError(
                f"{setting}=true: the adapter was trained on 4-bit weights, so merged into others it is another model: "
                f"set {setting}=false"
            )

    def lora_config(
        self, trained: "dict[str, list[int]] | None" = None, leaving_out: "Sequence[str]" = ()
    ) -> "LoraConfig":
        """These settings as peft takes them. `trained`: rows that are trained, by the name of their module;
        `leaving_out`: modules in which none is adapted."""
        from peft import LoraConfig, TaskType

        if self.begun is not None:
            config = LoraConfig.from_pretrained(self.begun.folder)
            config.inference_mode, config.init_lora_weights, config.lora_dropout = False, True, self.dropout
            return config
        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            exclude_modules=rf"({'|'.join(map(re.escape, leaving_out))})(\..*)?" if leaving_out else None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            modules_to_save=self.modules_to_save,
            trainable_token_indices=trained,
            init_lora_weights=True if self.init == "default" else self.init,  # type: ignore[arg-type]  # one of peft's
            task_type=TaskType.CAUSAL_LM,
        )

    def add(self, model: "PreTrainedModel", trained_ids: "Sequence[int]" = ()) -> None:
        """Adds the adapter, in fp32 whatever its layers are in, and freezes everything else.

        At first it changes nothing, since B A is zero, unless one is continued. In a model without weights its own
        stay empty too. `trained_ids`: of `trainable_tokens`.
        """
        import torch
        from peft import inject_adapter_in_model

        if self.begun is None:
            self.check_targets(model)
            self.check_modules(model)
        trained = {name: list(trained_ids) for name in trained_tokens.modules_with_rows(model)} if trained_ids else None
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # peft explains how it treats some layers
            try:
                config = self.lora_config(trained, [*language_part.rest_modules(model), *left_out(model)])
                inject_adapter_in_model(config, model, adapter_name=NAME)
            except ValueError as error:
                message = " ".join(str(error).split())[:300]
                raise UserError(f"the adapter doesn't fit {type(model).__name__}: {message}") from error
        if self.begun is not None:
            self.begun.check(model)
        if trained:
            trained_tokens.check(model)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft takes the dtype of the layer
            if parameter.requires_grad and not parameter.is_meta and (value := self.first(name, parameter)) is not None:
                parameter.data.copy_(value)

    def first(self, name: str, parameter: "Tensor") -> "Tensor | None":
        """What a weight of the adapter begins with, in fp32; None for what peft has taken from the base: the modules
        that are trained whole, the rows of trained tokens, and DoRA's magnitudes, the norms of the base's rows."""
        if TRAINED_WHOLE in name or trained_tokens.ROWS in name:
            return None
        if self.begun is not None:
            return self.begun.weight(name)
        if MAGNITUDE in name:
            return None
        return initial(name, getattr(parameter, "ds_shape", parameter.shape), self.init)  # of ZeRO-3, the whole

    def continuing(self, begun: "Begun") -> "Adapter":
        """These settings, with what the adapter that is continued decides by itself."""
        own = begun.settings
        for name in ("modules_to_save", "trainable_tokens"):
            if getattr(self, name):
                raise UserError(
                    f"adapter.{name}: model.path is an adapter, which is continued as it is: set adapter.{name}=null"
                )
        return replace(
            self,
            begun=begun,
            r=own["r"],
            alpha=own["lora_alpha"],
            target_modules=own["target_modules"],
            use_rslora=own.get("use_rslora", False),
            use_dora=own.get("use_dora", False),
            init="default",
        )

    def check_modules(self, model: "PreTrainedModel") -> None:
        """Refuses a module that isn't there, and embeddings or a head that share their weight."""
        head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
        tied = head is not None and head.weight is embeddings.weight
        for target in self.modules_to_save or ():
            found = [m for name, m in model.named_modules() if name == target or name.endswith(f".{target}")]
            if not found:
                raise UserError(f"adapter.modules_to_save: {target} is no module of {type(model).__name__}")
            if tied and any(module in (head, embeddings) for module in found):
                raise UserError(
                    f"adapter.modules_to_save: {target} shares its weight with the "
                    f"{'input embeddings' if head in found else 'head'}, and one copy alone would be trained: set "
                    "adapter=none, or leave it out"
                )
            if self.trainable_tokens and any(module in (head, embeddings) for module in found):
                raise UserError(
                    f"adapter.modules_to_save: {target} is trained whole, and adapter.trainable_tokens trains rows of "
                    "it: leave it out, or set adapter.trainable_tokens=null"
                )

    def check_targets(self, model: "PreTrainedModel") -> None:
        """Refuses a target that names no layer of the language part, one that isn't linear, or the input embeddings by
        another name."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        targets = self.target_modules
        if targets == "all-linear":
            return
        rest = language_part.rest_modules(model)
        own = {name: m for name, m in model.named_modules() if not f"{name}.".startswith(tuple(f"{r}." for r in rest))}
        special = left_out(model)
        linear = [name for name, m in own.items() if isinstance(m, nn.Linear | Conv1D) and name not in special]
        choices = f"its linear layers are {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linear))}"
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        patterns = {targets: targets} if isinstance(targets, str) else {t: rf"(.*\.)?{re.escape(t)}" for t in targets}
        for target, pattern in patterns.items():
            try:
                modules = {name: module for name, module in own.items() if re.fullmatch(pattern, name)}
            except re.error as error:
                raise UserError(
                    f"adapter.target_modules={target} is no regular expression ({error}): {choices}"
                ) from error
            if not modules:
                of = f"the language part of {type(model).__name__}" if rest else type(model).__name__
                raise UserError(f"adapter.target_modules: {target} is no layer of {of}: {choices}")
            for name, module in modules.items():
                if name in special:
                    raise UserError(f"adapter.target_modules: {target} means {name}, {special[name]}: leave it out")
                if name not in linear:
                    raise UserError(
                        f"adapter.target_modules: {target} means {name or 'the model'}, no linear layer: {choices}"
                    )
                if tied and module is head:
                    raise UserError(
                        f"adapter.target_modules: {target} means {name}, which shares its weight with the input "
                        "embeddings: leave it out"
                    )
                if self.trainable_tokens and module is head:
                    raise UserError(
                        f"adapter.target_modules: {target} means {name}, of which adapter.trainable_tokens trains "
                        "rows: leave it out, or set adapter.trainable_tokens=null"
                    )


def initial(name: str, shape: "Sequence[int]", init: object = "default") -> "Tensor":
    """An adapter's weight at first, as peft draws it. By default B is zero and A from ±1 / sqrt(number of inputs).

    `gaussian`: A is normal of standard deviation 1 / r. `orthogonal`: A and B are drawn from two halves of an
    orthogonal basis of rank r, so that B A is zero (https://datta0.github.io/posts/rethink-lora-init/).

    It depends on its name and on torch's last seed alone, so A is the same on all ranks, however the model is loaded
    and sharded.
    """
    import torch

    def generator(text: str) -> torch.Generator:
        return torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(text.encode()))

    # In fp32 on the processor, whatever torch's defaults are while the model is made.
    weight = torch.zeros(*shape, dtype=torch.float32, device="cpu")
    is_a = ".lora_A." in name
    if init == "orthogonal":
        rank = shape[0] if is_a else shape[1]
        layer = name.replace(".lora_B.", ".lora_A.")
        basis, _ = torch.linalg.qr(torch.zeros(rank, rank).normal_(generator=generator(f"{layer} basis")))
        half = basis[0::2] if is_a else basis[1::2]  # [rank / 2, rank]
        size = shape[1] if is_a else shape[0]
        drawn = torch.zeros(size, rank // 2).normal_(generator=generator(name)) @ half / 10  # [size, rank]
        return (drawn.T if is_a else drawn).contiguous()
    if not is_a:
        return weight
    if init == "gaussian":
        return weight.normal_(std=1 / shape[0], generator=generator(name))
    return (weight.uniform_(generator=generator(name)) * 2 - 1) / math.sqrt(shape[1])


def stored_name(name: str) -> str:
    """The name that peft stores a weight of the adapter by."""
    short = name.replace(MAGNITUDE, ".lora_magnitude_vector").replace(TRAINED_WHOLE, ".").replace(f".{NAME}.", ".")
    return f"base_model.model.{short.replace(f'{trained_tokens.ROWS}.{NAME}', trained_tokens.ROWS)}"


def base_name(name: str) -> str:
    """The name in the base model of a weight of the model with an adapter."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(TRAINED_WHOLE, ".")


def check_whole(use_dora: bool, trainable_tokens: object) -> None:
    """Refuses what begins as something of whole weights, under a strategy that shards them."""
    for setting, needed in (
        ("use_dora=true" if use_dora else "", "the norms of whole weights"),
        ("trainable_tokens" if trainable_tokens else "", "rows of whole embeddings"),
    ):
        if setting:
            raise UserError(
                f"adapter.{setting} needs {needed}, which this strategy shards: set strategy=ddp or deepspeed_zero2"
            )


def check_quantization(strategy: str = "", accelerator: str = "auto", here: bool = True) -> None:
    """Refuses 4-bit weights without CUDA or bitsandbytes, and under a strategy that shards weights.

    `here`: the run is on this machine, which is checked too; else only its settings are.
    """
    import torch

    if accelerator == "cpu" or (here and not torch.cuda.is_available()):
        raise UserError("adapter=qlora holds weights in 4 bits, which needs a CUDA device: set adapter=lora")
    if strategy.startswith(("deepspeed_zero3", "fsdp")):
        raise UserError(
            f"adapter=qlora: strategy={strategy} can't shard weights in 4 bits: set strategy=ddp or adapter=lora"
        )
    if here and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("adapter=qlora needs bitsandbytes: pip install bitsandbytes")


def quantization() -> dict[str, Any]:
    """Options of `from_pretrained` that load a model in 4 bits on this process's device."""
    import torch
    from transformers import BitsAndBytesConfig

    check_quantization()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}
