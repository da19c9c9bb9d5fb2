"""Answers: what a model makes of prompts in token ids, in batches, with transformers' own loop and KV cache."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria
from transformers.utils import logging as transformers_logging

from sft.model.isolation import attending, configs, own_attention

GREEDY: Mapping[str, object] = {"do_sample": False}


def answer(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    pad: int,
    stops: Sequence[int],
    sampling: Mapping[str, object] = GREEDY,
    width: int = 0,
    device: torch.device | None = None,
    synced: bool = False,
    is_over: Callable[[], bool] | None = None,
) -> list[list[int]]:
    """The token ids that follow each prompt, up to the first stop token, which is the last of them if there is one.

    A model that padding matters to answers one prompt at a time.

    Args:
        sampling: how a token is chosen, in transformers' words.
        width: the number of tokens that prompts are padded to, at least.
        device: of the model, if it can't say so itself.
        synced: another rank computes the same layers, and each waits for the other in every forward pass: this one
            goes on until all ranks have finished.
        is_over: asked after each token; all answers of this rank are cut once it says so.
    """
    width = max(width, *map(len, prompts))
    device = device or model.device
    if len(prompts) > 1 and not _ignores_padding(model, device):
        return [
            answer(
                model,
                [prompt],
                max_new_tokens=max_new_tokens,
                pad=pad,
                stops=stops,
                sampling=sampling,
                device=device,
                synced=synced,
                is_over=is_over,
            )[0]
            for prompt in prompts
        ]
    # Padded on the left, where no new token has to follow it, and masked.
    padded = torch.tensor([[pad] * (width - len(ids)) + [*ids] for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    generated = model.generate(  # type: ignore[operator]  # of transformers' mixin
        input_ids=padded.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=max_new_tokens,
        eos_token_id=[*stops] or None,
        pad_token_id=pad,
        num_beams=1,  # the model's own generation config may say otherwise
        num_return_sequences=1,
        use_cache=True,
        synced_gpus=synced,
        stopping_criteria=[_Over(is_over)] if is_over else [],
        **sampling,
    )
    return [_to_stop(new_ids, stops) for new_ids in generated[:, width:].tolist()]


_IGNORES_PADDING: "WeakKeyDictionary[PreTrainedModel, bool]" = WeakKeyDictionary()
PADDED = 13  # tokens, no multiple of what a kernel takes at once
ALIKE = {torch.float32: 1e-3}  # differences of logits by another shape alone, in other types up to 0.1


@torch.no_grad()
def _ignores_padding(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether a prompt's answer is the same with padding before it, as a model must see to that carries a state from
    token to token. Tried once for a model, on all ranks that answer together."""
    if model not in _IGNORES_PADDING:
        ids = torch.arange(1, 9)[None] % model.config.get_text_config().vocab_size
        logits = []
        for num in (0, PADDED):
            out = model.generate(  # type: ignore[operator]
                input_ids=F.pad(ids, (num, 0)).to(device),
                attention_mask=F.pad(torch.ones_like(ids), (num, 0)).to(device),
                max_new_tokens=3,  # from the second on by the state that the prompt has left
                eos_token_id=None,
                pad_token_id=0,
                num_beams=1,
                use_cache=True,
                return_dict_in_generate=True,
                output_logits=True,
                **GREEDY,
            )
            logits.append(torch.cat(out.logits).float())
        difference = float((logits[0] - logits[1]).abs().max())
        of_autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if of_autocast else model.dtype
        _IGNORES_PADDING[model] = difference <= ALIKE.get(dtype, 0.1)
    return _IGNORES_PADDING[model]


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stops: Sequence[int]) -> str:
    """Of an answer, without its stop token."""
    ended = bool(ids) and ids[-1] in stops
    return str(tokenizer.decode([*ids[:-1]] if ended else [*ids], skip_special_tokens=True))


def _to_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    end = next((at for at, token in enumerate(ids, 1) if token in stops), len(ids))
    return ids[:end]


class _Over(StoppingCriteria):
    def __init__(self, is_over: Callable[[], bool]) -> None:
        self.is_over = is_over

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        return torch.full((len(input_ids),), self.is_over(), device=input_ids.device)


@contextmanager
def answering(model: PreTrainedModel) -> Iterator[None]:
    """Inside, a model in training can answer: without dropout, by an attention that knows masks and caches, layer by
    layer as it is written. Afterwards it is as it was."""
    in_training = [module for module in model.modules() if module.training]
    with_routers = [config for config in configs(model) if getattr(config, "output_router_logits", False)]
    verbosity = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()  # it would explain what greedy answers leave without effect
        model.eval()
        for config in with_routers:
            config.output_router_logits = False
        # The graphs are for packs, and one more for each length would push them out.
        with attending(model, own_attention(model)), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for config in with_routers:
            config.output_router_logits = True
        for module in in_training:
            module.training = True
        transformers_logging.set_verbosity(verbosity)
