"""What it costs that the samples of a model run one at a time."""

import time
from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from sft.model import cause
from sft.model.measured_pass import Pass, measured
from sft.ranks import together


def times_slower(
    model: PreTrainedModel, run_of: Callable[[Tensor], Pass], row_T: Tensor, num: float, tokens: float
) -> float:
    """About how many times slower passes of one sample are than of `num` with so many tokens: a pass is taken to cost a
    constant and so much for each token. At least two passes of at most 1024 tokens are timed, of the tokens `row_T`."""
    short, long = round(tokens / num), round(min(tokens, 1024))
    row_T = row_T.repeat(long // len(row_T) + 1)

    def seconds(length: int) -> float:
        run, times = run_of(row_T[:length]), []
        for _ in range(2):
            begun = time.perf_counter()
            measured(model, run)  # brings its figures to the host
            times.append(time.perf_counter() - begun)
        return min(times)

    if not 1 < short < long:
        return 1.0
    try:
        few, many = seconds(short), seconds(long)
    except Exception as error:  # an estimate ends no run
        cause.raise_own(error)
        return 1.0
    per_token = max(0.0, (many - few) / (long - short))
    constant = max(0.0, few - per_token * short)
    slower = (num * constant + per_token * tokens) / (constant + per_token * tokens)
    return max(together(lambda: slower))
