"""Adds a low-rank adapter (LoRA, arXiv 2106.09685) to a model. Its layers are peft's."""

import importlib.util
import math
import re
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import LoraConfig
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "default"  # peft's own for an adapter that is the only one


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

    def __post_init__(self) -> None:
        self.check_merge(self.merge, "adapter.merge")

    def check_merge(self, merge: bool, setting: str) -> None:
        """Refuses to merge an adapter into other weights than it was trained with."""
        if self.quantize and merge:
            raise UserError(
                f"{setting}=true: the adapter was trained on 4-bit weights, so merged into others it is another model: "
                f"set {setting}=false"
            )

    def lora_config(self) -> "LoraConfig":
        """These settings as peft takes them."""
        from peft import LoraConfig, TaskType

        return LoraConfig(
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            use_rslora=self.use_rslora,
            task_type=TaskType.CAUSAL_LM,
        )

    def add(self, model: "PreTrainedModel") -> None:
        """Adds the adapter, in fp32 whatever its layers are in, and freezes everything else.

        At first it changes nothing, since B is zero. In a model without weights its own stay empty too.
        """
        import torch
        from peft import inject_adapter_in_model

        self.check_targets(model)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # peft explains how it treats some layers
            inject_adapter_in_model(self.lora_config(), model, adapter_name=NAME)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # peft takes the dtype of the layer
            if parameter.requires_grad and not parameter.is_meta:
                parameter.data.copy_(initial(name, parameter.shape))

    def check_targets(self, model: "PreTrainedModel") -> None:
        """Refuses a target that names no layer, one that isn't linear, or the input embeddings by another name."""
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        targets = self.target_modules
        if targets == "all-linear":
            return
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        choices = f"its linear layers are {', '.join(dict.fromkeys(name.rpartition('.')[2] for name in linear))}"
        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        patterns = {targets: targets} if isinstance(targets, str) else {t: rf"(.*\.)?{re.escape(t)}" for t in targets}
        for target, pattern in patterns.items():
            try:
                modules = {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}
            except re.error as error:
                raise UserError(
                    f"adapter.target_modules={target} is no regular expression ({error}): {choices}"
                ) from error
            if not modules:
                raise UserError(f"adapter.target_modules: {target} is no layer of {type(model).__name__}: {choices}")
            for name, module in modules.items():
                if name not in linear:
                    raise UserError(
                        f"adapter.target_modules: {target} means {name or 'the model'}, no linear layer: {choices}"
                    )
                if tied and module is head:
                    raise UserError(
                        f"adapter.target_modules: {target} means {name}, which shares its weight with the input "
                        "embeddings: leave it out"
                    )


def initial(name: str, shape: "Sequence[int]") -> "Tensor":
    """An adapter's weight at first: zero for B; A is drawn as peft does, from ±1 / sqrt(number of inputs).

    It depends on its name and on torch's last seed alone, so A is the same on all ranks, however the model is loaded
    and sharded.
    """
    import torch

    # In fp32 on the processor, whatever torch's defaults are while the model is made.
    weight = torch.zeros(*shape, dtype=torch.float32, device="cpu")
    if ".lora_A." not in name:
        return weight
    generator = torch.Generator().manual_seed(torch.initial_seed() ^ zlib.crc32(name.encode()))
    return (weight.uniform_(generator=generator) * 2 - 1) / math.sqrt(shape[1])


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
