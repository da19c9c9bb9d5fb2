"""Tells people of what needs a look while a run goes on: a line in the log, an event, and an alert of W&B."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger

from sft.runs import events
from sft.training.log import log

WINDOW = 100  # steps with which one is compared, and between two alerts of a kind
LEAST = 20  # steps before anything is compared
SPIKE = 8.0  # standard deviations above the median, of a normal distribution with the same median deviation
STALLED = 20  # steps in a row at less than a third of the median speed
RECALL = 0.2  # share of ends at which stopping is the likeliest, once reached
SIGMA = 1.4826  # median absolute deviation → standard deviation of a normal distribution


class Alerts(Logger):
    """Looks at the metrics that all loggers get. `history`: the rows of metrics.csv so far, for which none is sent."""

    name = "alerts"
    version = 0

    def __init__(self, folder: Path, trackers: list[Logger], history: list[dict[str, str]]) -> None:
        super().__init__()
        self.folder, self.trackers = folder, trackers
        self.losses, self.speeds = deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW + STALLED)
        self.stops: dict[str, float] = {}  # the best so far
        self.sent: dict[str, int] = {}  # step of the last of each title
        self.told = {(event.get("step"), event.get("title")) for event in events.read(folder) if _is_alert(event)}
        self.step = 0
        for row in history:
            values = {name: float(value) for name, value in row.items() if name != "step" and value}
            for title, _ in self.look(values):
                self.sent[title] = int(row["step"])

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.step = int(step or 0)
        for title, text in self.look(metrics):
            if self.step - self.sent.get(title, -WINDOW) >= WINDOW:
                self.sent[title] = self.step
                self.alert_all(title, f"step {self.step}: {text}")

    @rank_zero_only
    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        """None of them is looked at."""

    def look(self, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
        """Title and text of what needs a look in these metrics."""
        found = []
        if (loss := metrics.get("train/loss")) is not None:
            found += _spike(loss, self.losses)
            self.losses.append(loss)
        if (speed := metrics.get("train/tokens_per_second")) is not None:
            self.speeds.append(speed)
            found += _stall(list(self.speeds))
        for name in ("val/stop_recall", "val/stop_prob"):
            if (value := metrics.get(name)) is not None:
                best = self.stops[name] = max(value, self.stops.get(name, value))
                if best >= RECALL and value < best / 2:
                    found.append(("Stop tokens fail", f"{name} is {value:.2f}, after {best:.2f}: answers may not end"))
        return found

    @rank_zero_only
    def not_finite(self, error: Exception) -> None:
        """The loss is no number; the run ends by it, and says so itself."""
        self.alert_all("Loss is not a number", str(error), said=True)

    def alert_all(self, title: str, text: str, said: bool = False) -> None:
        """`said`: the log has it already."""
        if (self.step, title) in self.told:  # by an earlier attempt, whose steps are repeated
            return
        if not said:
            log(f"alert: {title}: {text}")
        events.record(self.folder, "alert", step=self.step, title=title, text=text)
        for tracker in self.trackers:
            if hasattr(tracker, "alert"):
                tracker.alert(title, text)


def _is_alert(event: events.Event) -> bool:
    return event.get("event") == "alert"


def _spike(loss: float, before: deque[float]) -> list[tuple[str, str]]:
    """Against the median and the median absolute deviation, which spikes before it hardly move."""
    if len(before) < LEAST:
        return []
    middle = median(before)
    deviation = SIGMA * median(abs(each - middle) for each in before)
    if loss <= middle + max(SPIKE * deviation, 0.1 * abs(middle)):
        return []
    return [
        ("Loss spikes", f"the loss is {loss:.4f}, where the last {len(before)} steps have a median of {middle:.4f}")
    ]


def _stall(speeds: list[float]) -> list[tuple[str, str]]:
    before, now = speeds[:-STALLED], speeds[-STALLED:]
    if len(before) < LEAST or max(now) >= median(before) / 3:
        return []
    return [
        ("Training is slow", f"{median(now):,.0f} tokens/s in the last {STALLED} steps, {median(before):,.0f} before")
    ]
