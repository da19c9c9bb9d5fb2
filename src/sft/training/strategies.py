"""The strategies: Lightning's, and what training asks of one beyond Lightning's interface (`Placement`).

DDP adds up in the same order after a resume. DeepSpeed runs on any device and scales the loss once. DeepSpeed's stage 3
and FSDP2 shard a model before its weights are read.
"""

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sft.checkpoint.layout import Rows, Whole, ZeRO3, ZeRO12, allocate, move_buffers
from sft.config.literal import instantiate
from sft.errors import UserError
from sft.model.loading import decoder_layers
from sft.model.sharded_loading import Sharding
from sft.training.compilation import find_ninja

OptimizerFactory = Callable[..., Optimizer]


class Placement:
    """Where a strategy keeps parameters and states; these are the answers of one that keeps everything whole.

    A strategy of your own is a class of this and of one of Lightning's, named in a file of conf/strategy/.
    """

    layout: type[Whole] = Whole

    @property
    def rounds(self) -> bool:
        """Whether the model's weights are roundings of those that the optimizer steps on."""
        return False

    @property
    def sharding(self) -> Sharding | None:
        """Itself, if its `shard` is to be called on the model before the weights are read."""
        return None

    def optimizer_factory(self, factory: OptimizerFactory) -> OptimizerFactory:
        """The optimizer that computes what `factory`'s does, where the states are."""
        return factory

    def forward(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context of a forward pass of a model that isn't called by the strategy."""
        return nullcontext()


def placement(strategy: Strategy) -> Placement:
    """What a trainer's strategy says of itself; `UserError` for one that shards and doesn't say how."""
    if isinstance(strategy, Placement):
        return strategy
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy):
        return Placement()
    raise UserError(
        f"{type(strategy).__name__} doesn't say where it keeps weights and states, so they can't be saved: choose one "
        "of conf/strategy/, or give it a layout (sft.training.strategies.Placement)"
    )


def build(settings: DictConfig | None, accelerator: str) -> Strategy | str:
    """The strategy that `conf/strategy/*.yaml` names, as the trainer takes it."""
    if not settings:
        return "auto"
    if accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available()):
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed looks for one by itself, and says so
    find_ninja()  # for ops that DeepSpeed compiles on first use
    strategy: Strategy = instantiate(settings, _convert_="all")
    return strategy


def weights_dtype(trainer: Trainer) -> torch.dtype:
    """What the frozen weights are loaded in; those that are trained are in fp32, whatever a strategy makes of them."""
    if trainer.precision != "bf16-true":
        return torch.float32
    # Lightning would convert the whole model once more, and with it what has to stay in fp32: the adapter, and the
    # frequencies of rotary embeddings.
    trainer.precision_plugin.convert_module = lambda module: module  # type: ignore[method-assign]
    return torch.bfloat16


class DDP(Placement, DDPStrategy):
    """PyTorch's DistributedDataParallel, whose buckets of gradients are the same from the first step on.

    It makes them anew after a process's first backward pass, in the order in which the gradients came. The bucket and
    the place in it decide in which order more than two ranks add up, so that the step after a resume would differ in
    its last bits from that of a run that nothing stopped.
    """

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        ddp = super()._setup_model(model)
        # A first backward pass without the model: the order is that of the parameters, last first.
        parameters = [parameter for parameter in ddp.parameters() if parameter.requires_grad]
        ddp.reducer.prepare_for_backward([])
        for parameter in reversed(parameters):
            (parameter * 0).sum().backward()
        for parameter in parameters:
            parameter.grad = None
        ddp.reducer._rebuild_buckets()
        return ddp


class DeepSpeed(Placement, DeepSpeedStrategy):
    """DeepSpeed ZeRO by its own configuration, on CUDA or on the processor.

    Args:
        config: DeepSpeed's configuration; batch sizes, accumulation, clipping and precision come from the trainer.
    """

    def __init__(self, config: dict[str, Any], **options: Any) -> None:
        config = {
            # Lightning would ask a loader for its batch size to fill this in; it only labels DeepSpeed's own timers,
            # which would wait for the device in each micro-batch.
            "train_micro_batch_size_per_gpu": 1,
            "timers": {"throughput": {"enabled": False}},
            "zero_allow_untested_optimizer": True,
            **config,
        }
        # By default some families' experts are "leaf modules", whose gradients a hook sends as soon as their input's is
        # known: once for each forward pass, of which a micro-batch may have several, and in a proof as well. They are
        # for experts of which each is a module that not every pass calls; transformers' are one.
        zero = {"leaf_module": {"classes": []}, **config.get("zero_optimization", {})}
        super().__init__(config={**config, "zero_optimization": zero}, **options)
        self.stage = config.get("zero_optimization", {}).get("stage", 0)
        self.offloads_optimizer = "offload_optimizer" in config.get("zero_optimization", {})

    @property
    def layout(self) -> type[Whole]:  # type: ignore[override]  # the stage is a setting
        return ZeRO3 if self.zero_stage_3 else ZeRO12

    def optimizer_factory(self, factory: OptimizerFactory) -> OptimizerFactory:
        if not self.offloads_optimizer:
            return factory
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        assert isinstance(factory, partial)  # torch's AdamW, as settings.check makes sure
        settings = {
            name: value for name, value in factory.keywords.items() if name in ("lr", "betas", "eps", "weight_decay")
        }
        return partial(DeepSpeedCPUAdam, adamw_mode=True, **settings)

    @property
    def root_device(self) -> torch.device:
        # DeepSpeed wants an index, which the processor has none of.
        device = super().root_device
        return torch.device("cpu", self.local_rank) if device.type == "cpu" else device

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            from deepspeed import ops

            # Would be compiled when the processes meet, and gloo does without.
            ops.__compatible_ops__["deepspeed_shm_comm"] = False
            super(DeepSpeedStrategy, self).setup_environment()  # Lightning's own refuses all but CUDA
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        # `shard` partitions the model. In Lightning's own `zero.Init` a second one would be nested.
        self._init_config_if_needed()
        yield

    @property
    def rounds(self) -> bool:
        return str(self.precision_plugin.precision).startswith("bf16")

    @property
    def sharding(self) -> Sharding | None:
        return self if self.zero_stage_3 else None

    def shard(self, model: nn.Module) -> None:
        """Gives each rank its range of each parameter, one parameter at a time."""
        import deepspeed

        partition = deepspeed.zero.Init(config_dict_or_path=self.config)._convert_to_zero_parameters
        # Each parameter is whole in the same place: freed in between, the places would not be used again.
        largest = max(parameter.numel() * parameter.itemsize for parameter in model.parameters())
        place = torch.zeros(largest, dtype=torch.uint8, device=self.root_device)
        tied: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if id(parameter) not in tied:
                    dtype = torch.bfloat16 if self.rounds else parameter.dtype
                    whole = place[: parameter.numel() * dtype.itemsize].view(dtype).view(parameter.shape)
                    tied[id(parameter)] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                    partition([tied[id(parameter)]])
                setattr(module, name, tied[id(parameter)])
        # DeepSpeed takes a model that is partitioned already for one that is on the device.
        move_buffers(model, dict(model.named_buffers()), self.root_device)

    @contextmanager
    def forward(self, model: nn.Module) -> Generator[None, None, None]:
        # Within it a weight that one module reads of another, as mixers do of their convolutions, is gathered, and
        # with that module from then on.
        held = [module._parameters for module in model.modules()] if self.zero_stage_3 else []
        for parameters in held:
            parameters._in_forward = True  # type: ignore[attr-defined]  # as DeepSpeed's engine does
        try:
            yield
        finally:
            for parameters in held:
                parameters._in_forward = False  # type: ignore[attr-defined]

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        # Lightning has divided by the accumulation already; DeepSpeed would do it again.
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Tensor], *args: Any, **kwargs: Any) -> object:
        result = super().optimizer_step(optimizer, closure, *args, **kwargs)
        norm = self.deepspeed_engine.get_global_grad_norm()  # before clipping, of all ranks' gradients
        if norm is not None and self.lightning_module is not None:
            self.lightning_module.grad_norm = torch.as_tensor(norm)
        return result


class FSDP2(Placement, ModelParallelStrategy):
    """PyTorch's fully_shard: each decoder layer's parameters are gathered when it runs.

    Args:
        reshard_after_forward: frees them again between forward and backward, at the price of a second gathering.
    """

    def __init__(self, reshard_after_forward: bool = True, **options: Any) -> None:
        super().__init__(tensor_parallel_size=1, **options)
        self.reshard_after_forward = reshard_after_forward

    layout = Rows

    @property
    def sharding(self) -> Sharding:
        return self

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, model: nn.Module) -> None:
        """Gives each rank its rows of each parameter; a decoder layer is gathered at a time."""
        mixed = self.precision_plugin.precision == "bf16-mixed"
        # bf16 in the arithmetic and on the network, fp32 in the sums of the gradients and in the optimizer.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        mesh = self.device_mesh["data_parallel"]
        for layer in decoder_layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        allocate(model, self.root_device)
