"""A configuration made small: a few narrow layers of the same architecture, the first rows of the same data.

It runs the same code in seconds, on a processor as well. Sizes are odd, so that nothing divides evenly among ranks.
Dropout is off, since the ranks of two strategies draw different random numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from transformers import PretrainedConfig, PreTrainedModel

from sft.config.literal import instantiate
from sft.errors import UserError
from sft.model.model_class import auto_class, of_folder
from sft.proof import small_config
from sft.proof.small_config import Form

HEAD_DIM = 8
# Of linear attention, which norms vectors of so many channels: of few, some are so short that rounding is amplified.
LINEAR_HEAD_DIM = 32
# Hidden channels of each head and channels within a layer. Odd ones come first; not every architecture takes them.
SIZES = ((7, 45), (8, 45), (8, 44), (16, 44))
# Of fields that some architectures have.
SIZE_OF = {
    "moe_intermediate_size": 24,  # in bf16 a multiple of 16 bytes, which grouped products need
    "shared_expert_intermediate_size": 20,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": HEAD_DIM,
    "qk_nope_head_dim": HEAD_DIM,
    "v_head_dim": HEAD_DIM,
    "query_pre_attn_scalar": HEAD_DIM,
    "linear_head_dim": LINEAR_HEAD_DIM,
    "linear_key_head_dim": LINEAR_HEAD_DIM,
    "linear_value_head_dim": LINEAR_HEAD_DIM,
}
NOISE = 0.05  # of parameters that are all alike, and not 1
NUM_TOKENS = 24  # of a trial, more than a window has; the least vocabulary has one more


def first_rows(data: DictConfig, num_rows: int) -> None:
    """Cuts a data configuration to the first rows. A data set that `datasets` saved has no slices and stays whole."""
    paths: list[str] = []
    named = data.val_path.values() if isinstance(data.val_path, DictConfig) else [data.val_path]
    for value in (data.path, *named):
        paths += [value] if isinstance(value, str) else value or []
    if any((Path(path) / name).exists() for path in paths for name in ("dataset_dict.json", "state.json")):
        return
    for name in ("split", "val_split"):
        if data[name] and "[" not in data[name]:
            data[name] = f"{data[name]}[:{num_rows}]"


def shrink(config: DictConfig, folder: Path, device: str, precision: str, vocab_size: int | None = None) -> None:
    """Makes a configuration train a small model, written to `folder/model`, on one node's `cpu` or `gpu`.

    `vocab_size` None keeps the size that the tokenizer needs.
    """
    source = instantiate(config.model, _convert_="all")
    write_model(folder / "model", source.load_config(), vocab_size, config.seed, source.trust_remote_code)
    # The revision stays: it is the tokenizer's too, and means nothing to a folder.
    config.model.tokenizer, config.model.new_weights = source.tokenizer_place()[0], None
    if vocab_size is not None:
        config.model.add_tokens = None
    config.model.path, config.model.init, config.model.config = str(folder / "model"), "pretrained", {}
    if config.model.attention.startswith("flash"):
        config.model.attention = "auto"  # which every machine has
    config.model.compile = False  # takes longer than all the rest
    if config.adapter:
        if vocab_size is not None:  # of the made-up model, whose head is its embeddings
            config.adapter.modules_to_save = config.adapter.trainable_tokens = None
        config.adapter.dropout, config.adapter.quantize = 0.0, False
    config.trainer.accelerator, config.trainer.num_nodes = device, 1
    config.trainer.precision = precision


def write_model(
    folder: Path, config: PretrainedConfig, vocab_size: int | None, seed: int, trust_remote_code: bool = False
) -> None:
    """Writes a small model of an architecture with weights drawn from the seed; UserError if no small form runs."""
    message = ""
    for form in forms(config, vocab_size):
        try:
            with deterministic(seed):
                small = form()
                model = auto_class(small).from_config(small, trust_remote_code=trust_remote_code, dtype=torch.float32)
                stir(model)
            logits = check_runs(model)
            model.save_pretrained(folder)
            reloaded = of_folder(str(folder), trust_remote_code=trust_remote_code).from_pretrained(
                folder, trust_remote_code=trust_remote_code, dtype=torch.float32
            )
            if not torch.allclose(check_runs(reloaded), logits, atol=1e-5):
                raise ValueError("it isn't the same after it is saved and loaded")
            return
        except Exception as error:  # whatever an architecture has against a form
            message = " ".join(str(error).split())[:200] or type(error).__name__
    raise UserError(f"no small form of {type(config).__name__} runs ({message}): name another model with model.path")


def forms(config: PretrainedConfig, vocab_size: int | None) -> Iterator[Callable[[], PretrainedConfig]]:
    """What makes a small configuration, the preferred first."""
    general = [Form(vocab_size, *divisors) for divisors in small_config.divisors(config)]
    yield from (partial(odd, config, general[0], *sizes) for sizes in SIZES)
    yield from (partial(form.of, config) for form in general[:3])
    # Some share weights between layers of a kind.
    yield from (partial(replace(form, layers=2).of, config) for form in general[:3])
    yield from (partial(form.of, config) for form in general[3:])


def odd(config: PretrainedConfig, form: Form, width: int, intermediate_size: int) -> PretrainedConfig:
    """A small configuration whose text part has `width` hidden channels for each head."""
    small = form.of(config)
    big, text = small_config.text_of(config), small_config.text_of(small)
    num_groups = getattr(big, "num_key_value_heads", None) or big.num_attention_heads
    ratio = big.num_attention_heads // num_groups
    num_groups = 1 if num_groups == 1 and ratio > 1 else 3 if ratio <= 3 else 2
    _replace(text, "num_key_value_heads", num_groups)
    text.num_attention_heads = num_groups * min(ratio, 4)
    text.hidden_size = text.num_attention_heads * width
    _replace(text, "head_dim", HEAD_DIM)
    _replace(text, "intermediate_size", intermediate_size)
    for name, size in SIZE_OF.items():
        if getattr(big, name, None):
            _replace(text, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(text, name, None)
    return type(config).from_dict(small.to_dict())


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Draws from the seed; what a class leaves uninitialised is NaN."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


def stir(model: PreTrainedModel) -> None:
    """Adds noise to parameters that are all alike, such as gates of 0, so that every parameter matters.

    Those of 1 stay, and matter: ZeRO and FSDP2 hold a norm's weights in bf16, which holds 1 exactly. The rounding of
    any other is the same for every token, and doesn't average out as a certificate in bf16 takes roundings to do.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and parameter.is_floating_point():
                if not parameter.isfinite().all():
                    parameter.zero_()
                first = parameter.flatten()[0]
                if first != 1 and (parameter == first).all():
                    parameter.add_(NOISE * torch.randn(parameter.shape))


def check_runs(model: PreTrainedModel) -> torch.Tensor:
    """The logits of a sample; ValueError where they aren't finite, or where a token sees none before it."""
    ids = torch.arange(NUM_TOKENS).repeat(2, 1)
    ids[1, 0] = NUM_TOKENS
    with torch.no_grad():
        first, second = model.eval()(input_ids=ids, use_cache=False).logits
    if not first.isfinite().all():
        raise ValueError("its logits aren't finite")
    if torch.allclose(first[1:], second[1:], atol=1e-6):
        raise ValueError("its logits don't depend on earlier tokens")
    return first


def _replace(text: PretrainedConfig, name: str, value: float) -> None:
    """Sets a field if the architecture has it."""
    if getattr(text, name, None) is not None:
        setattr(text, name, value)
