"""What came of it, in a sentence that can be sent round, and in a few figures."""

import math
from collections.abc import Iterator

import numpy as np

from sft.report.folder import Folder
from sft.report.html import duration, escaped, figure, percent
from sft.report.story import Attempt, attempts
from sft.runs.answers_file import Answer


def chosen_step(folder: Folder) -> int | None:
    """The step whose figures count: the exported one, else the last that was validated."""
    exported = folder.status.get("exported")
    if isinstance(exported, int):
        return exported
    steps, _ = folder.points("val/loss")
    return int(steps[-1]) if len(steps) else None


def newest(folder: Folder) -> list[Answer]:
    """The answers of the exported step, else those of the last step that has any; each prompt's once."""
    steps = {answer["step"] for answer in folder.answers}
    if not steps:
        return []
    step = chosen_step(folder)
    step = step if step in steps else max(steps)
    return list({answer["number"]: answer for answer in folder.answers if answer["step"] == step}.values())


def sentence(folder: Folder) -> str:
    """The headline, as plain text."""
    return " ".join(_sentences(folder)) or "Nothing is measured yet."


def _sentences(folder: Folder) -> Iterator[str]:
    step = chosen_step(folder)
    before, after = folder.first("val/loss"), folder.last("val/loss", step)
    steps, losses = folder.points("val/loss")
    gain, error = folder.last("val/gain", step), folder.last("val/gain_error", step)
    known = gain is not None and math.isfinite(gain)
    if before is not None and after is not None and len(steps) > 1 and step != steps[0]:
        # An extended run's first loss is not that of its base, nor is an average's.
        same = known and math.isclose(before - after, gain or 0.0, abs_tol=0.01 * before)
        sure = f" ± {percent(error / before)}" if same and error is not None else ""
        known = known and not same
        change = f" ({percent(after / before - 1)}{sure})" if before > 0 and math.isfinite(after) else ""
        fell = "fell" if after < before else "rose" if after > before else "stayed"
        num = int(step or 0) - int(steps[0])
        to = f"from {figure(before)} to {figure(after)} nats a token{change}"
        yield f"Validation loss {fell} {to} in {num:,} step{'s' * (num != 1)}."
    elif before is not None:
        yield f"Validation loss is {figure(before)} nats a token before training."
    elif len(trained := folder.points("train/loss")[1]) > 1:
        part = max(1, len(trained) // 20)
        start, end = float(trained[:part].mean()), float(trained[-part:].mean())
        yield f"Training loss went from {figure(start)} to {figure(end)} nats a token; nothing was held out."
    if known:
        sure = f" ± {figure(error, 2)}" if error is not None else ""
        than = "better" if (gain or 0.0) >= 0 else "worse"
        yield f"It is {figure(abs(gain or 0.0), 3)}{sure} nats a token {than} than the base model on held-out samples."
    compared = [answer for answer in newest(folder) if answer["base_score"] is not None]
    if compared and step:
        better = sum(answer["score"] > (answer["base_score"] or 0) for answer in compared)
        base = sum(answer["base_score"] or 0 for answer in compared) / len(compared)
        now = sum(answer["score"] for answer in compared) / len(compared)
        prompts = f"{better} of {len(compared)} held-out prompts"
        yield f"Its answer is better than the base model's on {prompts} (mean score {now:.2f}, base {base:.2f})."
    if len(losses) > 3 and after is not None:
        best = int(losses.argmin())
        if losses[best] < 0.98 * after and steps[best] != step:
            yield f"The loss was lowest at step {int(steps[best]):,}, {figure(losses[best])}, and has risen since."


def tiles(folder: Folder) -> list[tuple[str, str, str]]:
    """Figures with what each is and a remark."""
    step = chosen_step(folder)
    found = []

    def tile(name: str, column: str, form: str = "", remark: str = "") -> None:
        value = folder.last(column, step)
        if value is not None:
            shown = percent(value) if form == "%" else figure(value, 3 if column == "answers/score" else 4)
            found.append((name, shown, remark))

    first = folder.first("val/loss")
    tile("validation loss", "val/loss", remark=f"{figure(first)} before" if first is not None else "")
    tile("perplexity", "val/perplexity")
    tile("token accuracy", "val/accuracy", "%")
    base = folder.last("answers/base_score", step)
    tile("score of answers", "answers/score", remark=f"{figure(base, 3)} base" if base is not None else "")
    tile("exactly right", "answers/exact", "%")
    tile("stops where it should", "val/stop_recall", "%")
    tile("KL to the base", "val/kl_base", remark="nats a token")
    _, speeds = folder.points("train/tokens_per_second")
    if len(speeds):
        found.append(("throughput", figure(float(np.median(speeds)), 3), "tokens/s, median step"))
    return found


def progress(folder: Folder, written: float) -> str:
    """State, step, time and what is left; HTML."""
    num_steps = folder.status.get("num_steps")
    step, story = folder.step, attempts(folder, written)
    of = f"step {step:,} of {num_steps:,}" if isinstance(num_steps, int) else f"step {step:,}"
    took = sum(attempt.seconds for attempt in story)
    parts = [of, *([f"{duration(took)} in {len(story)} attempt{'s' * (len(story) > 1)}"] if story else [])]
    left = time_left(folder, story, num_steps)
    if left is not None:
        parts.append(f"about {duration(left)} left")
    if folder.status.get("host"):
        parts.append(f"on {', '.join(story[-1].hosts[:4]) if story and story[-1].hosts else folder.status['host']}")
    if early := folder.status.get("stopped_early"):
        parts.append(f"ended early: {early}")
    bar = ""
    if isinstance(num_steps, int) and folder.state != "finished":
        bar = f'<progress max="{num_steps}" value="{step}">{step}/{num_steps}</progress>'
    words = " · ".join(escaped(part) for part in parts)
    state = escaped(folder.state)
    return f'<p class="state"><b class="badge {state.split()[0]}">{state}</b> {words}</p>{bar}'


def time_left(folder: Folder, story: list[Attempt], num_steps: object) -> float | None:
    """Seconds, at the speed of the current attempt."""
    if not folder.running or not story or not isinstance(num_steps, int):
        return None
    done = folder.step - story[-1].first
    return story[-1].seconds / done * (num_steps - folder.step) if done > 0 else None
