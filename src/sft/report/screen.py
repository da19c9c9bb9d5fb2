"""What a terminal shows of a run: progress, curves, an answer, events."""

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from rich.console import Group
from rich.text import Text

from sft.cluster.time_limit import clock
from sft.report.progress import Progress
from sft.runs.answers_file import Answer
from sft.runs.events import Event
from sft.runs.metrics_file import Curve
from sft.runs.plain import plain

BLOCKS = "▁▂▃▄▅▆▇█"
CURVES = {  # label, form, and whether the scale is logarithmic, not from 0 on
    "train/loss": ("training loss", ".4f", True),
    "val/loss": ("validation loss", ".4f", True),
    "train/lr": ("learning rate", ".2e", False),
    "train/grad_norm": ("gradient norm", ".4g", True),
    "train/tokens_per_second": ("tokens/s", ",.0f", False),
}
SEEN = {"train/epoch": "epoch {:.2f}", "train/tokens": "{:,.0f} tokens"}
SHADES = {"running": "green", "finished": "green", "failed": "red", "died": "red", "unreadable": "red"}
EVENT_SHADES = {"alert": "yellow", "failure": "red", "stop": "red", "requeue": "yellow", "finish": "green"}
MOST_EVENTS = 6
EMPTY = "(empty)"  # an answer without text
MOST_VALUES = 50  # of a curve that one character stands for: of more, some are left out


def shade(state: str) -> str:
    return SHADES.get(state.partition(" ")[0], "yellow")


def view(
    run: Progress, curves: Mapping[str, Curve], answer: Answer | None, width: int, height: int, now: float
) -> Group:
    """All of it in at most `height` lines: where there is less room, fewer events, then no answer."""
    parts = [headlines(run, curves, width), charts(run, curves, width)]
    room = height - sum(len(part) + 1 for part in parts if part)
    if answer and room >= 4:
        parts.append(sample(answer, width))
        room -= 5
    if room > 0:
        parts.append(timeline(run.story, now)[-min(room, MOST_EVENTS) :])
    lines: list[Text] = []
    for part in parts:
        lines += [*([Text()] if lines and part else []), *part]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return Group(*lines)


def headlines(run: Progress, curves: Mapping[str, Curve], width: int) -> list[Text]:
    """Name, state and place; how far it is; what is wrong."""
    where = f"on {', '.join(map(plain, run.hosts[:3]))}" + (f" + {len(run.hosts) - 3}" if len(run.hosts) > 3 else "")
    restart = next((event.get("restart", 0) for event in reversed(run.story) if "job" in event), 0)
    job = f"job {run.job}" + (f", restart {restart}" if restart else "")
    words = [where if run.hosts else "", job if run.job else "", f"waits: {plain(run.waits)}" if run.waits else ""]
    first = Text.assemble((plain(run.folder.name), "bold"), "  ", (run.state, shade(run.state)))
    first.append("".join(f"  {word}" for word in words if word), "dim")
    lines = [first]
    if run.num_steps:
        lines.append(progress(run, width))
    seen = [
        form.format(curves[name].values[-1]) for name, form in SEEN.items() if name in curves and curves[name].steps
    ]
    if seen:
        lines.append(Text("   ".join(seen), "dim"))
    if run.error:
        lines.append(Text(plain(" ".join(run.error.split())), "red"))
    return lines


def progress(run: Progress, width: int) -> Text:
    """A bar of the steps, their number, the time that they took and the time that is left."""
    words = [f"{run.step:,}/{run.num_steps:,}", f"{run.step / (run.num_steps or math.inf):.0%}"]
    words += [] if math.isnan(run.left) else [f"{clock(run.left)} left"]
    if not math.isnan(run.taken):
        words.append(f"took {clock(run.taken)}" if run.exit_code == 0 else f"{clock(run.taken)} so far")
    while len(words) > 1 and 10 + sum(len(word) + 2 for word in words) > width:
        words.pop()
    text = "".join(f"  {word}" for word in words)
    return share(run, max(0, width - len(text))).append(text)


def share(run: Progress, width: int) -> Text:
    """How many of the steps are done, as a bar."""
    done = round(width * min(1.0, run.step / run.num_steps)) if run.num_steps else 0
    return Text.assemble(("━" * done, shade(run.state)), ("─" * (width - done), "dim"))


def charts(run: Progress, curves: Mapping[str, Curve], width: int) -> list[Text]:
    """First, best and last value of each curve, and its course, all over the same steps."""
    wide = width >= 60
    room = width - (50 if wide else 28)
    lines = [Text(f"{'':<15}" + (f"{'first':>11}{'best':>11}" if wide else "") + f"{'now':>11}", "dim")]
    for name, (label, form, log) in CURVES.items():
        curve = curves.get(name)
        if not curve or not curve.values:
            continue
        best = min(filter(math.isfinite, curve.values), default=math.nan)
        two = [curve.values[0] if name.endswith("/loss") else None, best if name == "val/loss" else None]
        numbers = "".join(f"{'' if value is None else format(value, form):>11}" for value in two if wide)
        last = (f"{format(curve.values[-1], form):>11}", "bold")
        lines.append(Text.assemble((f"{label:<15}", "dim"), numbers, last))
        if room >= 8:
            lines[-1].append(f"  {sparkline(curve, run.step, room, log)}", "cyan")
    return lines if lines[1:] else []


def sparkline(curve: Curve, last: int, width: int, log: bool = False) -> str:
    """The curve from step 0 to `last` in `width` characters, each the mean of its steps, or as before where nothing
    was measured; ! where that isn't finite. On a scale from 0, or below, to the highest; `log`: on a logarithmic one
    from the lowest, if all are positive."""
    sums, counts = [0.0] * width, [0] * width
    for at in range(0, len(curve.steps), max(1, len(curve.steps) // (width * MOST_VALUES))):
        place = min(width - 1, curve.steps[at] * width // (last + 1))
        sums[place] += curve.values[at]
        counts[place] += 1
    means = [total / count if count else None for total, count in zip(sums, counts, strict=True)]
    finite = [mean for mean in means if mean is not None and math.isfinite(mean)]
    log = log and min(finite, default=0.0) > 0
    scale = math.log if log else float
    low, high = scale(min([*finite, *([] if log else [0.0])])), scale(max(finite, default=0.0))
    shown, before = "", " "
    for mean in means:
        if mean is not None:
            share = (scale(mean) - low) / (high - low) if math.isfinite(mean) and high > low else 0.0
            before = BLOCKS[round(share * (len(BLOCKS) - 1))] if math.isfinite(mean) else "!"
        shown += before
    return shown


def news(before: Progress, run: Progress, is_validated: bool, now: float) -> list[str]:
    """A line for each event since, for a validation, and for another state."""
    lines = [f"{plain(run.folder.name)}  {line}" for line in map(str, timeline(run.story[len(before.story) :], now))]
    if is_validated:
        figures = {"training loss": run.loss, "validation loss": run.val_loss}
        words = [f"{name} {value:.4f}" for name, value in figures.items() if not math.isnan(value)]
        words += [] if math.isnan(run.left) else [f"{clock(run.left)} left"]
        lines.append("  ".join([plain(run.folder.name), f"step {run.step}/{run.num_steps}", *words]))
    if run.state != before.state:
        why = f": {plain(' '.join(run.error.split()))}" if run.error else ""
        lines.append(f"{plain(run.folder.name)}  {run.state} at step {run.step}{why}")
    return lines


def sample(answer: Answer, width: int) -> list[Text]:
    """A prompt with its reference and its answer, a line each."""
    cut = "" if answer["stopped"] else ", cut"
    lines = [Text(f"answer after step {answer['step']}, score {answer['score']:.2f}{cut}", "dim")]
    styles = {"prompt": "", "reference": "", "answer": "bold"}
    texts = {name: plain(str(answer.get(name))) or EMPTY for name in styles}
    return [*lines, *(Text.assemble((f"  {name:<11}", "dim"), (texts[name], styles[name])) for name in styles)]


def timeline(story: Sequence[Event], now: float) -> list[Text]:
    """A line an event, of saves only the last."""
    saves = [at for at, event in enumerate(story) if event["event"] == "save"]
    events = [event for at, event in enumerate(story) if at not in saves[:-1]]
    times = [moment(event["time"], now) for event in events]
    most = max(map(len, times), default=0)
    shown = []
    for time, event in zip(times, events, strict=True):
        text = f"  {plain(event['event']):<8}  {plain(details(event))}"
        shown.append(Text.assemble((f"{time:<{most}}", "dim"), (text, EVENT_SHADES.get(event["event"], ""))))
    return shown


def moment(time: str, now: float) -> str:
    """In the local time zone; with the day if it isn't today."""
    then = datetime.fromisoformat(time).astimezone()
    return f"{then:%H:%M:%S}" if then.date() == datetime.fromtimestamp(now).date() else f"{then:%b %d %H:%M}"


def details(event: Event) -> str:
    """What an event says, in the order that a reader asks: where, what, why."""
    step = f"step {event['step']}" if "step" in event else ""
    step = "" if step and str(event.get("text", "")).startswith(f"{step}:") else step  # an alert says it itself
    seconds = f"in {event['seconds']:.1f} s" if "seconds" in event else ""
    hosts = f"on {', '.join(event['hosts'])}" if event.get("hosts") else ""
    ranks = f"{event['num_ranks']} ranks" if event.get("num_ranks", 1) > 1 else ""
    job = f"job {event['job']}" if event["event"] == "submit" and "job" in event else ""
    if event["event"] == "job":
        job = f"{event.get('job')}, restart {event.get('restart', 0)}, on {event.get('job_nodelist')}"
    text = ": ".join(str(event[key]) for key in ("title", "signal", "cause", "text", "error", "why") if event.get(key))
    return ", ".join(word for word in (step, seconds, hosts, ranks, job, text) if word)
