"""`metrics.csv`, the file that holds each step exactly once."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from sft.runs import lease
from sft.runs.files import fsync, write_text
from sft.runs.metrics_file import Metrics
from sft.training.log import log

COLUMNS = (
    "step",
    "train/loss",
    "train/lr",
    "train/grad_norm",
    "train/grad_norm_clipped",
    "train/clipped",
    "train/clipped_share",
    "train/supervised_share",
    "train/pack_fill",
    "train/tokens",
    "train/supervised_tokens",
    "train/epoch",
    "train/tokens_per_second",
    "train/seconds",
    "train/data_wait",
    "train/memory_peak",
    "val/loss",
    "val/perplexity",
)


class MetricsFile(Logger):
    """`metrics.csv`: a row a step, in order, none twice and none missing however often the run was killed.

    A validation's columns go into the row of the step that it followed. Row 0 is before training. A resumed run
    first drops the rows after its checkpoint, since it makes those steps again.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)
        self.metrics = Metrics(list(COLUMNS), [])

    name = "metrics"
    version = 0

    @rank_zero_only
    def resume(self, step: int, digest: str | None = None) -> None:
        """Keeps the rows up to `step`; with step 0 none, since a fresh start measures again. `digest`: theirs when the
        checkpoint was saved; says so where it is another."""
        stored = Metrics.read(self.path)
        if stored.num_lost:
            log(f"note: {self.path}: {stored.num_lost} of its lines can't be read and are left out")
        self.metrics.columns = stored.columns or self.metrics.columns
        self.metrics.rows = [row for row in stored.rows if 0 < step >= int(row["step"])]
        if step and digest and digest != self.metrics.digest(step) and not stored.num_lost:
            log(f"note: {self.path} is not what was written up to step {step}: its curves up to there may be wrong")
        self._rewrite()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if lease.is_lost():  # the rows are another's; at the step's end all ranks stop
            return
        step = int(step or 0)
        values = {name: repr(float(value)) for name, value in metrics.items() if name != "epoch"}
        columns, rows = self.metrics.columns, self.metrics.rows
        new = [name for name in values if name not in columns]
        columns += new
        if rows and rows[-1]["step"] == str(step):
            rows[-1] |= values
            self._rewrite()
        else:
            rows.append({"step": str(step)} | values)
            if new or len(rows) == 1:
                self._rewrite()
            else:
                with self.path.open("a", newline="") as file:
                    file.write(self._text(rows[-1:], header=False))

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """The configuration is in `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Waits until the rows are on the disk: a checkpoint must not outlive the rows up to its step."""
        if self.path.exists():
            fsync(self.path)

    def _text(self, rows: list[dict[str, str]], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.metrics.columns, restval="", lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def _rewrite(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, self._text(self.metrics.rows, header=True))
