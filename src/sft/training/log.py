"""The first rank, which alone prints and writes."""

from lightning.fabric.utilities.rank_zero import rank_zero_only
from tqdm import tqdm

from sft.runs.plain import lines
from sft.runs.secrets import hidden


@rank_zero_only
def log(message: str) -> None:
    """Prints one line at once, so that it is in a batch job's log when the job is killed; above a progress bar."""
    with tqdm.external_write_mode():
        print(lines(hidden(message)), flush=True)


def is_main() -> bool:
    """Whether this is the first rank, known from the launcher before any process group exists."""
    return rank_zero_only.rank == 0  # type: ignore[attr-defined]
