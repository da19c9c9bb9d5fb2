"""Which tokens of its own sample a token sees, as the model says it.

transformers' models ask for a mask by the name of the attention. The function registered here makes no tensor: it reads
from transformers' own mask function whether a layer wants causal, sliding or chunked attention, and hands it that.
Whatever else a model asks for is an error, `CannotPack`: nothing is guessed.
"""

import inspect
from dataclasses import dataclass
from functools import cache, wraps
from types import FunctionType
from typing import Any, NoReturn

from transformers import masking_utils

from sft.errors import UserError

NAME = "packed"
CAUSAL = "causal_mask_function"
WINDOW = "sliding_window_overlay.<locals>.inner_mask"
CHUNK = "chunked_overlay.<locals>.inner_mask"
BOTH = "and_masks.<locals>.and_mask"


class CannotPack(UserError):
    """The model's attention isn't one that `packed` computes."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}, which attention={NAME} doesn't compute: set model.attention=own")


@dataclass(frozen=True, eq=False)
class Visible:
    """What a token sees: itself and the tokens of its sample before it; if it is set, of these only the

    window: last so many, itself among them;
    chunk: ones of its own chunk, the sample being cut into chunks of so many.

    It stands in the place of a mask and is none: a model that computes with it fails.
    """

    window: int | None = None
    chunk: int | None = None

    def __getitem__(self, part: object) -> "Visible":
        """Itself: models cut a mask to the length of the keys."""
        if isinstance(part, tuple) and all(each is ... or isinstance(each, slice) for each in part):
            return self
        self._is_no_tensor()

    def __eq__(self, other: object) -> bool:
        return self is other if isinstance(other, Visible) else self._is_no_tensor()

    __hash__ = object.__hash__

    def _is_no_tensor(self, *_: object) -> NoReturn:
        raise TypeError("its layers compute with the mask themselves")

    __bool__ = __len__ = __iter__ = _is_no_tensor  # what Python would answer by itself
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _is_no_tensor  # what it would call unsupported


@cache
def visible(window: int | None = None, chunk: int | None = None) -> Visible:
    return Visible(window, chunk)


def make_mask(
    *, mask_function: Any, attention_mask: object = None, local_size: int | None = None, **_: object
) -> Visible:
    """What transformers calls for a mask, once a forward pass for each kind of layer.

    Raises:
        CannotPack: it is neither causal nor sliding nor chunked, or some tokens are padding.
    """
    seen = _read(mask_function)
    if attention_mask is not None or seen is None or local_size not in (seen.window, seen.chunk):
        raise CannotPack("The model has an attention mask that is neither causal nor sliding nor chunked")
    return seen


def _read(function: FunctionType) -> Visible | None:
    """By the names and closures of transformers' mask functions; None: it is another.

    Values would say the same, and cost a wait for the device, where a chunked mask keeps its padding.
    """
    parts = _closure(function)["mask_functions"] if _name(function) == BOTH else (function,)
    found = {_name(part): _closure(part) for part in parts}
    if len(parts) != len(found) or CAUSAL not in found:
        return None
    if set(found) == {CAUSAL}:
        return visible()
    if set(found) == {CAUSAL, WINDOW}:
        return visible(window=found[WINDOW]["sliding_window"])
    if set(found) == {CAUSAL, CHUNK}:
        return visible(chunk=found[CHUNK]["chunk_size"])
    return None


def _name(function: FunctionType) -> str:
    """Within transformers' module of masks; empty for a function from elsewhere."""
    return function.__qualname__ if function.__module__ == masking_utils.__name__ else ""


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = function.__closure__ or ()
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in cells), strict=True))


def _boundaries_are_given() -> None:
    """Has transformers leave it for our attention to guess boundaries of samples from the positions.

    It would ask the device for each mask, and is wrong for positions of three rows (transformers #44911).
    """
    preprocess: Any = getattr(masking_utils, "_preprocess_mask_arguments", None)
    if preprocess is None:
        return  # a transformers that guesses no more (#46851)
    signature = inspect.signature(preprocess)

    @wraps(preprocess)
    def without_guess(*arguments: Any, **named: Any) -> Any:
        given = signature.bind(*arguments, **named).arguments
        if given["config"]._attn_implementation == NAME and "position_ids" in given:
            given["position_ids"] = None
        return preprocess(**given)

    masking_utils._preprocess_mask_arguments = without_guess


_boundaries_are_given()
masking_utils.AttentionMaskInterface.register(NAME, make_mask)
