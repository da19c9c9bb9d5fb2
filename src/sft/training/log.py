"""The lines that a command prints, from the first rank alone."""

from lightning.fabric.utilities.rank_zero import rank_zero_only


@rank_zero_only
def log(message: str) -> None:
    """Prints one line at once, so that it is in a batch job's log when the job is killed."""
    print(message, flush=True)
