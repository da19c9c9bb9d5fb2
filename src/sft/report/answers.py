"""The same held-out prompts before and after: base model, reference and the answer at each step."""

import re
from collections.abc import Sequence
from typing import Any

from sft.report.folder import Folder
from sft.report.headline import newest
from sft.report.html import escaped, visible
from sft.report.screen import EMPTY
from sft.runs.answers_file import Answer

MOST_PROMPTS, MOST_STEPS = 24, 24
BYTES = 1_200_000  # of all texts together
LENGTHS = (4000, 1500, 600, 200)  # characters of a text, the first by which they fit


def cards(folder: Folder) -> tuple[str, dict[str, Any], str]:
    """The cards as HTML, with the last answers; for samples.js those of all steps; and what is left out."""
    now = newest(folder)
    shown = now[:MOST_PROMPTS]
    numbers = {answer["number"] for answer in shown}
    every = sorted({answer["step"] for answer in folder.answers})
    steps = spaced(every, MOST_STEPS, shown[0]["step"] if shown else 0)
    kept = [answer for answer in folder.answers if answer["number"] in numbers and answer["step"] in set(steps)]
    most = next((most for most in LENGTHS if _bytes(kept, most) < BYTES), LENGTHS[-1])
    data: dict[str, Any] = {"steps": steps, "shown": steps.index(shown[0]["step"]) if shown else 0, "answers": {}}
    for answer in kept:
        of_step = data["answers"].setdefault(answer["step"], {})
        of_step[answer["number"]] = [cut(answer["answer"], most), round(answer["score"], 4), facts(answer)]
    notes = []
    if len(now) > len(shown):
        notes.append(f"{len(shown)} of {len(now)} prompts")
    if len(every) > len(steps):
        notes.append(f"{len(steps)} of {len(every)} steps")
    if any(len(answer[key] or "") > most for answer in kept for key in ("prompt", "reference", "base", "answer")):
        notes.append(f"the first {most:,} characters of a text")
    html = "".join(_card(answer, most) for answer in shown)
    return html, data, f"Here are {', '.join(notes)}; all are in samples.jsonl." if notes else ""


def _card(answer: Answer, most: int) -> str:
    number = answer["number"]
    base = ""
    if answer["base"] is not None:
        base = _answer("base model", answer["base"], answer["base_score"], "", most)
    return (
        f'<article class="sample" data-number="{number}"><header>prompt {number + 1}'
        f"<span>{escaped(answer['source'])}, row {answer['row']}</span></header>"
        f'<pre class="prompt" dir="auto">{escaped(cut(answer["prompt"], most))}</pre><div class="answers">'
        + base
        + _answer("tuned", answer["answer"], answer["score"], facts(answer), most, f"step {answer['step']:,}")
        + f'<div class="reference"><h4>reference</h4><pre dir="auto">{escaped(cut(answer["reference"], most))}</pre>'
        + "</div></div></article>"
    )


def _answer(name: str, text: str, score: float | None, said: str, most: int, at: str = "") -> str:
    rated = score is not None
    meter = f'<meter min="0" max="1" value="{score:.4f}"></meter><output>{score:.2f}</output>' if rated else ""
    return (
        f'<div class="{name.split()[0]}"><h4>{name} <small class="at">{at}</small></h4>'
        f'<pre dir="auto">{escaped(cut(text, most))}</pre>'
        f'<p class="score">{meter} <small class="said">{escaped(said)}</small></p></div>'
    )


def facts(answer: Answer) -> str:
    """Its length, and whether it stopped by itself."""
    end = "stopped" if answer["stopped"] else "cut, it didn't stop"
    num = answer["num_tokens"]
    return f"{num} token{'s' * (num != 1)} (reference {answer['num_reference_tokens']}), {end}"


def cut(text: str | None, most: int) -> str:
    """At most so many characters; line ends before and after everything else have a sign, or nobody saw them."""
    text = re.sub(
        r"\A\n+|\n+\Z", lambda ends: "↵" * len(ends[0]) if len(ends[0]) < 4 else f"[{len(ends[0])} ↵]", text or ""
    )
    return visible(text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)") or EMPTY


def spaced(steps: Sequence[int], most: int, always: int) -> list[int]:
    """At most so many steps, evenly spaced, with the first, the last and the one that is always there."""
    if len(steps) <= most:
        return list(steps)
    places = {round(at * (len(steps) - 1) / (most - 2)) for at in range(most - 1)}
    return sorted({steps[at] for at in places} | {always})


def _bytes(answers: Sequence[Answer], most: int) -> int:
    """Of the texts as ASCII, in which what isn't ASCII takes six."""
    texts = [answer["answer"] for answer in answers]
    once = {answer["number"]: answer for answer in answers}.values()
    texts += [text or "" for answer in once for text in (answer["prompt"], answer["reference"], answer["base"])]
    return sum(min(len(text), most) * (1 if text.isascii() else 6) for text in texts)
