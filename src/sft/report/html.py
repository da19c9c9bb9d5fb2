"""Text as HTML: escaped, with what has no sign of its own made visible."""

import html
import math
import re
from collections.abc import Iterable, Sequence

# Control characters, those that change the direction of what follows, and halves of characters. Not the joiners and
# marks that Persian, Hindi and emoji are written with.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)


def visible(text: object) -> str:
    """With the numbers of such characters in their place: no text of a data set may rearrange the page."""
    return UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", str(text))


def escaped(text: object) -> str:
    return html.escape(visible(text))


def figure(value: float | None, digits: int = 4) -> str:
    """A number of so many significant digits, with separators of thousands."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value and not 1e-4 <= abs(value) < 1e15:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def duration(seconds: float) -> str:
    """1 d 3 h, 2 h 5 min, 3 min 20 s or 8 s."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    at = next((at for at, (_, length) in enumerate(units) if seconds >= length), len(units) - 1)
    (unit, length), *smaller = units[at:]
    whole, rest = divmod(round(seconds), length)
    further = f" {rest // smaller[0][1]} {smaller[0][0]}" if smaller and rest >= smaller[0][1] else ""
    return f"{whole} {unit}{further}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """Of cells that are HTML already; `numbers`: the columns that are set to the right."""
    right = set(numbers)
    classes = ["number" if at in right else "" for at in range(len(header))]
    head = "".join(f'<th scope="col" class="{kind}">{cell}</th>' for kind, cell in zip(classes, header, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(classes, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(items: Iterable[tuple[str, str]]) -> str:
    """Terms with what they are, which is HTML already; those that are nothing are left out."""
    rows = "".join(f"<div><dt>{escaped(term)}</dt><dd>{value}</dd></div>" for term, value in items if value)
    return f'<dl class="pairs">{rows}</dl>'


def code(text: str) -> str:
    """A command or a piece of code, with a button that copies it."""
    return f'<div class="code"><pre>{escaped(text)}</pre></div>'


def more(summary: str, inner: str) -> str:
    """What is shown on demand."""
    return f"<details><summary>{escaped(summary)}</summary>{inner}</details>"


def section(name: str, title: str, inner: str, note: str = "") -> str:
    if not inner:
        return ""
    said = f'<p class="note">{note}</p>' if note else ""
    return f'<section id="{name}"><h2>{escaped(title)}</h2>{said}{inner}</section>'
