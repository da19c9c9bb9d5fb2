"""A configuration made small, whatever its architecture: by what its fields are named, none of which is known for sure.

Fields that count heads are divided by one number, widths of a head by another, and all other widths by both, so that
what hangs together still does: hidden_size = heads x head_dim, expand x hidden_size = state-space heads x their width.
Layers are the first of each kind, experts few, windows shorter than the samples. Parts (a vision tower, an encoder) are
made small alike.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from transformers import PretrainedConfig

WINDOW = 16  # tokens that a layer sees at once, fewer than a sample has, so that the limit has an effect
NUM_LAYERS = 2  # at least
MOST_LAYERS = 6  # of all combinations of kinds; else each value of each kind occurs once
MOST_COMPUTED = 12  # of kinds that recur by a period
NUM_EXPERTS, TOP_K, NUM_GROUPS = 4, 2, 2
FEWEST_CHANNELS, MOST_CHANNELS = 16, 512
NUM_STATES = 4  # of a state-space channel
INITIALIZER_RANGE = 0.1

# How the fields of configurations are named. Of several patterns that match, the first says what a field is.
LAYERS = re.compile(r"(^|_)(n_|num_)?(layers?|blocks?|depth)(_per_stack)?$")
EXPERTS = re.compile(r"experts?(_num)?$|^num_experts|moe_num_shared")
CHOSEN = re.compile(r"experts_per_tok|top_?k|^moe_k$")
GROUPS = re.compile(r"^n_group$|expert_group|topk_group")
WINDOWS = re.compile(r"window|chunk|local_attention$|block_size|^index_topk")
VOCABULARIES = re.compile(r"vocab(_size)?(_base|_per_layer_input)?$")
HEADS = re.compile(r"heads?$|heads_per_layer|query_groups|n_?groups$|_kv$")
OF_HEAD = re.compile(r"head_?(dim|size)|d_?head$|dim_head|^d_kv$|kv_channels|rotary_dim|rope_dim|pre_attn_scalar")
STATE = re.compile(r"d_state$|state_size$")
NO_WIDTH = re.compile(
    r"kernel|conv1d|d_conv|patch|image|crop|tile|buckets|merge|sampl|ngram|multiple|codebook_size|feature_size|batch|"
    r"(^|_)(num|max|n)_(?!embd|inner)|(audio|in|out)_channels|group_size|factor|position|shape|offset|token|prompt"
)
WIDTH = re.compile(r"size|dims?(_|$)|width|channel|rank|embd|inner|dff|lowrank|ffn|(^|_)d_|ssm|upsample_groups")
SPECIAL = re.compile(r"^(decoder_start|forced_[be]os|pad|bos|eos|sep|cls)_token_id$")
PREFIX = re.compile(r"first_k|num_dense|dense_layers|layer_start_index|loop_layer_index|max_window_layers")
SUFFIX = re.compile(r"num_kv_shared_layers")


@dataclass(frozen=True)
class Form:
    """How small."""

    vocab_size: int | None  # None: as it is
    heads: int  # divides counts of heads
    head: int  # divides the widths of a head
    layers: int = 1  # of each kind

    def of(self, config: PretrainedConfig) -> PretrainedConfig:
        """The small configuration of the same architecture."""
        return type(config).from_dict(small(config, self))


def divisors(config: PretrainedConfig) -> list[tuple[int, int]]:
    """What to divide counts of heads by, and widths of a head: first those that leave about 64 hidden channels."""
    text = text_of(config)
    if not width_of(text):  # it has parts alone
        parts = [part for part in vars(text).values() if isinstance(part, PretrainedConfig)]
        text = max(parts, key=width_of, default=text)
    fields, width = text.to_dict(), width_of(text)
    sizes = {name: value for name, value in fields.items() if is_count(value)}
    widths = [value for name, value in sizes.items() if OF_HEAD.search(name)]
    counts = [value for name, value in sizes.items() if HEADS.search(name) and not OF_HEAD.search(name)]
    if counts and not widths:
        widths = [width // max(counts)]
    common = math.gcd(*counts) if counts else 1
    most = min(widths, default=width) // 2
    found = [
        (heads, head)
        for heads in range(1, common + 1)
        for head in accumulate([1] + [2] * 10, int.__mul__)
        if common % heads == 0 and head <= most and FEWEST_CHANNELS <= width / (heads * head) <= MOST_CHANNELS
    ]

    def rank(pair: tuple[int, int]) -> tuple[bool, bool, float]:
        even = all(-(-value // pair[1]) % 2 == 0 for value in widths) and width % (pair[0] * pair[1]) == 0
        several = not counts or min(counts) // pair[0] >= 2
        return not even, not several, abs(math.log(width / (pair[0] * pair[1]) / 64))

    found.sort(key=rank)
    return found[:8] or [(1, 1)]


def width_of(config: PretrainedConfig) -> int:
    return int(getattr(config, "hidden_size", 0) or getattr(config, "d_model", 0) or 0)


def text_of(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of the part that reads and writes text."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # it has several
        return config


def small(config: PretrainedConfig, form: Form) -> dict[str, Any]:
    """The fields of a configuration and its parts."""
    fields = config.to_dict()
    is_text = config is text_of(config)
    real = type(config).attribute_map
    width = fields.get(real.get("hidden_size", "hidden_size"))
    layers_name = real.get("num_hidden_layers", "num_hidden_layers")
    num_layers = fields[layers_name] if is_count(fields.get(layers_name), 1) else 0
    kept = kept_layers(config, fields, num_layers, form.layers) if num_layers else []
    for name, value in list(fields.items()):
        part = vars(config).get(name)
        if isinstance(part, PretrainedConfig):
            fields[name] = small(part, form)
        elif name == "per_layer_config" and value:
            by_layer = {int(layer): overrides for layer, overrides in value.items()}
            fields[name] = {
                new: {key: smaller(key, field, form) for key, field in by_layer[old].items()}
                for new, old in enumerate(kept)
                if old in by_layer
            }
        elif kept and (layers := by_layers(name, value, num_layers, kept, form)) is not None:
            fields[name] = layers
        elif kept and PREFIX.search(name) and is_count(value, 0):
            fields[name] = sum(layer < value for layer in kept)
        elif kept and SUFFIX.search(name) and is_count(value, 0):
            fields[name] = sum(layer >= num_layers - value for layer in kept)
        elif name == layers_name and kept:
            fields[name] = len(kept)
        else:
            fields[name] = smaller(name, value, form)
    if not is_text and is_count(width):  # of a part, whose heads are others than the text's
        width = fields[real.get("hidden_size", "hidden_size")]
        for name, value in fields.items():
            if re.search(r"heads?$", name) and is_count(value) and not any(map(OF_HEAD.search, fields)):
                fields[name] = math.gcd(value, width)
    return fields


def smaller(name: str, value: Any, form: Form) -> Any:
    """One value of a field that says nothing about single layers."""
    if isinstance(value, dict):
        if name.startswith("rope"):
            return cut_rotary(value, form.head)
        return {key: smaller(f"{name}.{key}", inner, form) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if SPECIAL.search(name) and form.vocab_size:
            return [min(each, form.vocab_size - 1) for each in value]
        if WIDTH.search(name) and not NO_WIDTH.search(name):
            return [smaller(name, each, form) for each in value]
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if ("drop" in name or "jitter" in name) and 0 <= value < 1:
        return type(value)(0)
    if name in ("initializer_range", "init_std"):
        return INITIALIZER_RANGE
    if isinstance(value, float):
        return value
    if SPECIAL.search(name) or VOCABULARIES.search(name):
        largest = form.vocab_size if VOCABULARIES.search(name) else form.vocab_size and form.vocab_size - 1
        return min(value, largest) if largest else value
    for pattern, largest in (
        (GROUPS, 1 if name == "topk_group" else NUM_GROUPS),
        (CHOSEN, WINDOW if "index" in name else TOP_K),
        (EXPERTS, 1 if "shared" in name else NUM_EXPERTS),
        (WINDOWS, WINDOW),
        (LAYERS, NUM_LAYERS),
    ):
        if pattern.search(name):
            return min(value, largest)
    if STATE.search(name):
        return max(min(value, NUM_STATES), value // form.head)
    if OF_HEAD.search(name):
        return -(-value // form.head)
    if HEADS.search(name):
        return value // form.heads if value % form.heads == 0 else value
    if WIDTH.search(name) and not NO_WIDTH.search(name):
        return -(-value // (form.heads * form.head))
    return value


def is_count(value: object, least: int = 2) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def by_layers(name: str, value: object, num_layers: int, kept: list[int], form: Form) -> list[Any] | None:
    """The entries of a list that are of the layers kept, or those of its entries that number them; else None."""
    if not isinstance(value, list | tuple):
        return None
    if len(value) == num_layers and not numbers_all(value):
        return [smaller(name, value[layer], form) for layer in kept]
    if re.search("layer|idx|index", name) and all(is_count(each, 0) and each < num_layers for each in value):
        return [new for new, old in enumerate(kept) if old in value]
    return None


def numbers_all(value: list[Any] | tuple[Any, ...]) -> bool:
    """Whether a list as long as there are layers has the numbers of all of them, not an entry for each."""
    return [*value] == [*range(len(value))] and len(value) > 2


def kept_layers(config: PretrainedConfig, fields: Mapping[str, Any], num_layers: int, each: int) -> list[int]:
    """The first layers of each kind, `each` of them, and at least two in all.

    A kind is told by all lists with an entry for each layer. Where a class computes such a list, from periods that no
    selection of layers keeps, all layers up to the last of these are kept.
    """
    of_class = type(config)
    computed = [
        name for name in dir(of_class) if name.startswith("layer") and isinstance(getattr(of_class, name), property)
    ]
    lists = {}
    for name in (*fields, *computed):
        try:
            value = fields.get(name, getattr(config, name, None))
        except Exception:  # whatever a class computes
            continue
        if isinstance(value, list | tuple) and len(value) == num_layers and not numbers_all(value):
            lists[name] = [str(each) for each in value]
        elif isinstance(value, list | tuple) and re.search("layer|idx", name):
            lists[name] = [str(layer in value) for layer in range(num_layers)]
        elif PREFIX.search(name) and is_count(value, 0):
            lists[name] = [str(layer < value) for layer in range(num_layers)]
        elif SUFFIX.search(name) and is_count(value, 0):
            lists[name] = [str(layer >= num_layers - value) for layer in range(num_layers)]
        elif name == "per_layer_config" and isinstance(value, dict):
            by_layer = {int(layer): str(overrides) for layer, overrides in value.items()}
            lists[name] = [by_layer.get(layer, "") for layer in range(num_layers)]
    kinds = list(zip(*lists.values(), strict=True)) or [()] * num_layers
    first = [layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < each]
    if len(first) > MOST_LAYERS * each:
        seen: set[tuple[int, str]] = set()
        first = []
        for layer, kind in enumerate(kinds):
            if not seen.issuperset(enumerate(kind)):
                first.append(layer)
                seen.update(enumerate(kind))
    if lists.keys() & set(computed) - fields.keys() and max(first) < MOST_COMPUTED:
        first = [*range(max(first) + 1)]
    others = [layer for layer in range(num_layers) if layer not in first]
    return sorted([*first, *others[: max(0, NUM_LAYERS - len(first))]])


def cut_rotary(value: Any, head: int) -> Any:
    """Cuts lists that hold a factor for each pair of a head's channels, or add up to their number."""
    if isinstance(value, dict):
        return {name: cut_rotary(inner, head) for name, inner in value.items()}
    if not isinstance(value, list):
        return value
    if all(isinstance(each, int) for each in value) and len(value) <= 4:  # sections of the channels
        ends = [round(end / head) for end in accumulate(value)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return value[: -(-len(value) // head)]
