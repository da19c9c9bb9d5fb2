"""Random numbers by token: what is drawn for a token depends on its place in the run alone.

torch draws from one stream, so what dropout leaves of a token would depend on the tokens before it: on the
micro-batch, the rank and the pack. Here each token has a key, drawn from (seed, step, sample, position) by the loader,
and the number of a channel of a module is a hash of the key, the channel and the module's name. So they are the same
on every device and rank, in any micro-batch or pack, and when a layer is computed a second time.

Shape suffixes: T tokens of the row, C channels.
"""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from sft.data.batch import Batch

HALF = 2**31


class Tokens:
    """Those of the forward pass under way, whose keys its random numbers are drawn from."""

    key_T: Tensor | None = None  # int32; None: torch draws
    cu_seqlens: Tensor
    by_sample = False  # whether what a model draws from torch's stream by itself is its sample's own
    _seeds: list[int] | None = None

    def use(self, batch: Batch, alone: bool = False) -> None:
        """`alone`: the batch is one sample, from whose seed torch's stream begins."""
        self.key_T, self.cu_seqlens, self._seeds = batch.get("keys"), batch["cu_seqlens"], batch.get("seeds")
        self.by_sample = alone and self._seeds is not None
        if alone and self._seeds:
            torch.manual_seed(self._seeds[0] + HALF)

    def use_in_backward(self, output: Tensor) -> None:
        """Has the backward pass of a forward pass's output see the tokens of now, from which gradient checkpointing
        computes layers a second time, though others have had their forward pass since.

        Autograd takes what was computed last first, so all of one forward pass comes before any of those before it.
        """
        seen = dict(vars(self))
        if output.requires_grad:
            output.register_hook(lambda _: vars(self).update(seen))

    def seeds(self) -> list[int] | None:
        """A number for each sample, its first token's key."""
        if self.key_T is not None and self._seeds is None:
            self._seeds = self.key_T[self.cu_seqlens[:-1].long()].tolist()
        return None if self.key_T is None else self._seeds


TOKENS = Tokens()


def attach(model: PreTrainedModel, neftune_alpha: float) -> bool:
    """Has the model's dropout drawn by token, and adds NEFTune's noise; whether it needs the tokens' keys."""
    config = vars(model.config.get_text_config())
    drops = [value for name, value in config.items() if "dropout" in name or name.endswith("_pdrop")]
    for name, module in model.named_modules():
        if type(module) is nn.Dropout and module.p:
            module.forward = partial(_dropout, module, zlib.crc32(name.encode()))  # type: ignore[method-assign]
            drops.append(module.p)
    if neftune_alpha:
        model.get_input_embeddings().register_forward_hook(partial(_add_noise, neftune_alpha))
    return bool(neftune_alpha) or any(isinstance(value, float) and value > 0 for value in drops)


@torch.compiler.disable  # the tokens are others in each call
def _dropout(module: nn.Dropout, salt: int, values: Tensor) -> Tensor:
    """Dropout (arXiv 1207.0580) of [1, T, ...] or [T, ...]."""
    key_T = TOKENS.key_T
    by_token = key_T is not None and values.shape[0 if values.shape[0] != 1 else 1] == len(key_T)
    if not (module.training and by_token and module.p < 1):
        return F.dropout(values, module.p, module.training, module.inplace)
    assert key_T is not None
    drop = _numbers(key_T, salt, values.numel() // len(key_T)) < int(module.p * 2 * HALF) - HALF
    return (values * (1 / (1 - module.p))).masked_fill(drop.view(values.shape), 0)


def _add_noise(alpha: float, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Adds uniform(-1, 1) · alpha / sqrt(L · C) to embeddings [1, T, C] in training, L being the number of tokens of a
    token's own sample (NEFTune, arXiv 2310.05914)."""
    key_T = TOKENS.key_T
    if not module.training or key_T is None:
        return output
    length = TOKENS.cu_seqlens.diff()
    length_T = torch.repeat_interleave(length, length, output_size=len(key_T))
    noise_TC = uniform(key_T, output.shape[-1])
    noise_TC *= alpha * (length_T[:, None] * output.shape[-1]).rsqrt()
    return output + noise_TC.view(output.shape).to(output.dtype)


def uniform(key_T: Tensor, num_channels: int) -> Tensor:
    """NEFTune's random numbers, uniform from -1 to 1, float32 [T, C]."""
    return _numbers(key_T, zlib.crc32(b"neftune"), num_channels).float() / HALF


@contextmanager
def seeded(seed: int, salt: int, device: torch.device) -> Iterator[None]:
    """While it lasts torch's stream is a sample's own; afterwards it is where it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + HALF) << 16 | salt & 0xFFFF)
        yield


def _numbers(key_T: Tensor, salt: int, num_channels: int) -> Tensor:
    """int32 [T, C], of any value with equal probability: a hash of token, module and channel, by the multipliers of
    github.com/skeeto/hash-prospector. In place, since a number is made for every activation."""
    number_TC = key_T[:, None] ^ _channels(salt, num_channels, key_T.device)
    number_TC ^= (number_TC >> 16) & 0xFFFF  # shifts are signed
    number_TC *= 0x7FEB352D
    number_TC ^= (number_TC >> 15) & 0x1FFFF
    number_TC *= 0x846CA68B - 2 * HALF
    return number_TC


@cache
def _channels(salt: int, num_channels: int, device: torch.device) -> Tensor:
    numbers = np.random.default_rng(salt).integers(2 * HALF, size=num_channels, dtype=np.uint32)
    return torch.from_numpy(numbers.view(np.int32)).to(device)


def watch(model: nn.Module, log: Callable[[str], None]) -> None:
    """`log` gets a line, once, if the model draws random numbers by itself in its next forward pass of training, as
    the states of torch's streams before and after it tell."""

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]

    def before(module: nn.Module, inputs: object) -> None:
        if module.training:
            begun.extend(states())
            hooks[0].remove()

    def after(module: nn.Module, inputs: object, output: object) -> None:
        if not begun:
            return
        hooks[1].remove()
        if not (TOKENS.by_sample or all(map(torch.equal, begun, states()))):
            log(
                "this model draws random numbers of its own in training, which can't be drawn by token: with another "
                "micro_batch_size or number of ranks they are others"
            )

    begun: list[Tensor] = []
    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
