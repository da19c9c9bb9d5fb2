"""python -m sft.cluster.sweep INDEX OVERRIDE ...: one setting of a sweep, an override a line.

`optimizer.lr=1e-5,2e-5 seed=0,1` are four settings, 0 to 3, in the order of `sft train -m`: the last varies first.
"""

import sys

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sft.errors import UserError


def pick(index: int, overrides: list[str]) -> list[str]:
    """The overrides of setting `index`; `UserError` where there is none."""
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
        (settings,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise UserError(" ".join(str(error).split())) from error
    if not 0 <= index < len(settings):
        raise UserError(
            f"there is no setting {index}: these are {len(settings)} settings, sbatch --array=0-{len(settings) - 1}"
        )
    return settings[index]


if __name__ == "__main__":
    try:
        print("\n".join(pick(int(sys.argv[1]), sys.argv[2:])))
    except UserError as error:
        sys.exit(f"sft: {error}")
