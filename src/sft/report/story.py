"""What happened to a run, from its events: its attempts, how long each took, and what ended it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from sft.report.folder import Folder
from sft.report.html import duration, escaped, figure, table
from sft.runs.events import Event

ENDS = {"signal": "stopped by", "by_hand": "stopped by", "time_up": "stopped:", "failure": "failed:"}
DECIDED = {"finish", "requeue", "stop"}
BAD = {"failure", "stop", "alert"}
MOST = 200  # lines of the timeline


@dataclass
class Attempt:
    """From a start to whatever ended it."""

    start: float  # seconds since the epoch
    end: float
    first: int  # step that it began after
    last: int
    ranks: int
    hosts: list[str] = field(default_factory=list)
    how: str = ""

    @property
    def seconds(self) -> float:
        return max(0.0, self.end - self.start)


def moment(time: object) -> float | None:
    """Seconds since the epoch of an event's time."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return None


def attempts(folder: Folder, now: float) -> list[Attempt]:
    """All attempts, oldest first. One that was killed ends with the last that was heard of it."""
    found: list[Attempt] = []
    for event in folder.events:
        at, kind = moment(event.get("time")), event["event"]
        if at is None:
            continue
        step = event.get("step")
        if kind == "start":
            hosts = [str(host) for host in event.get("hosts") or []]
            first = step if isinstance(step, int) else 0
            found.append(Attempt(at, at, first, first, int(event.get("num_ranks") or 1), hosts))
        elif found and kind not in ("job", "submit") and not (found[-1].how and kind in DECIDED):
            found[-1].end = max(found[-1].end, at)
            found[-1].last = max(found[-1].last, step if isinstance(step, int) else 0)
            found[-1].how = _how(event) or found[-1].how
    if found and not found[-1].how:
        last = found[-1]
        if folder.running:
            last.how, last.end, last.last = "running", max(last.end, now), max(last.last, folder.step)
        else:
            last.how = folder.state
            ended = moment(folder.status.get("time"))
            last.end = max(last.end, ended or 0.0)
    for attempt in found[:-1]:
        attempt.how = attempt.how or "ended without a message"
    return found


def _how(event: Event) -> str:
    kind = event["event"]
    if kind in ENDS:
        reason = event.get("signal") or event.get("why") or event.get("cause") or ""
        return f"{ENDS[kind]} {reason}".strip() if reason else ENDS[kind].rstrip(":").removesuffix(" by")
    if kind in DECIDED:
        cause = str(event.get("cause") or "").replace("_", " ")
        return "finished" if kind == "finish" else cause or kind
    return ""


def cost(folder: Folder, now: float) -> str:
    """Time of machines, tokens and speed, and the attempts that they come from."""
    story = attempts(folder, now)
    if not story:
        return ""
    seconds = sum(attempt.seconds * attempt.ranks for attempt in story)
    device = str(folder.recipe.get("device") or "")
    accelerator = str((folder.config.get("trainer") or {}).get("accelerator") or "")
    on_cpu = "cpu" in device.lower() or (not device and accelerator == "cpu")
    unit = "rank-hours" if on_cpu or not device else "GPU-hours"
    tokens = folder.last("train/tokens")
    if tokens is None and isinstance(per_step := folder.recipe.get("tokens_per_step"), int | float):
        tokens = per_step * folder.step
    words = [f"<b>{figure(seconds / 3600, 3)}</b> {unit}{f' ({escaped(device)})' if device else ''}"]
    words.append(f"<b>{escaped(duration(sum(attempt.seconds for attempt in story)))}</b> of training and export")
    if tokens:
        words.append(f"<b>{figure(tokens, 3)}</b> tokens trained")
        if seconds > 1:
            words.append(
                f"<b>{figure(tokens / (seconds / 3600), 3)}</b> tokens a {unit.removesuffix('s')}, all included"
            )
    rows = [
        (
            str(number),
            _clock(attempt.start),
            escaped(f"{attempt.ranks} on {', '.join(attempt.hosts[:4]) or '?'}{', …' * (len(attempt.hosts) > 4)}"),
            f"{attempt.first:,} – {attempt.last:,}",
            escaped(duration(attempt.seconds)),
            escaped(attempt.how),
        )
        for number, attempt in enumerate(story[:MOST], 1)
    ]
    header = ("attempt", "began (UTC)", "ranks", "steps", "took", "ended")
    return f"<p>{' · '.join(words)}</p>{table(header, rows, (0, 3, 4))}"


def timeline(events: Sequence[Event], clean: Any) -> str:
    """A line an event; saves that follow one another are one line. `clean`: leaves out what is secret."""
    lines: list[tuple[str, str, str, str]] = []  # kind, time, name, text
    saves: list[Event] = []

    def flush() -> None:
        if not saves:
            return
        first, last = (saves[at].get("step", 0) for at in (0, -1))
        took = figure(sum(event.get("seconds") or 0.0 for event in saves) / len(saves), 3)
        many = f"steps {first:,} to {last:,}, {len(saves)} times, {took} s each"
        lines.append(("save", str(saves[0]["time"]), "saved", many if len(saves) > 1 else f"step {first:,}, {took} s"))
        saves.clear()

    for event in events:
        if event["event"] == "save":
            saves.append(event)
            continue
        flush()
        kind = event["event"]
        lines.append((kind, str(event.get("time", "")), _name(kind), _text(event)))
    flush()
    left = len(lines) - MOST
    shown = lines if left <= 0 else [*lines[: MOST // 2], *lines[-MOST // 2 :]]
    items = []
    for at, (kind, time, name, text) in enumerate(shown):
        if left > 0 and at == MOST // 2:
            items.append(f"<li>… {left:,} more in events.jsonl …</li>")
        seconds = moment(time)
        when = _clock(seconds) if seconds is not None else escaped(time)
        tone = "bad" if kind in BAD else "good" if kind in ("finish", "start") else ""
        items.append(f'<li class="{tone}"><time>{when}</time><b>{escaped(name)}</b> {escaped(clean(text))}</li>')
    return f'<ol class="timeline">{"".join(items)}</ol>' if items else ""


def _name(kind: str) -> str:
    names = {"by_hand": "stopped by hand", "time_up": "time is up", "job": "job began", "submit": "submitted"}
    return names.get(kind, kind.replace("_", " "))


def _text(event: Event) -> str:
    """What the event says, its hosts and ranks in words."""
    said: dict[str, Any] = {**event}
    parts = []
    if "num_ranks" in said:
        hosts = [str(host) for host in said.get("hosts") or []]
        parts.append(f"{said['num_ranks']} rank{'s' * (said['num_ranks'] != 1)} on {', '.join(hosts[:8])}")
    if isinstance(step := said.get("step"), int):
        parts.append(f"{'after step' if said['event'] == 'start' else 'step'} {step:,}")
    if said.get("cause"):
        parts.append(str(said["cause"]).replace("_", " "))
    parts += [
        str(said[key])
        for key in ("title", "signal", "why", "error", "text", "attention", "changed", "job_nodelist")
        if said.get(key)
    ]
    if said.get("rank") is not None:
        parts.append(f"rank {said['rank']} on {said.get('host', '?')}")
    if said.get("job") is not None:
        restart = said.get("restart")
        parts.append(f"job {said['job']}" + (f", restart {restart}" if restart else ""))
    return " · ".join(parts)[:600]


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
