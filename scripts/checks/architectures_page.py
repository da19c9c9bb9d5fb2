"""docs/architectures.md: what has become of each architecture, as a page."""

from collections.abc import Iterator, Mapping
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]

KINDS = ("packed", "apart", "refused", "silently wrong", "traceback", "not run")
FAULTS = ("silently wrong", "traceback")
COLUMNS = {
    "model type": "of a model's `config.json`",
    "how": "*packed*: the samples of a micro-batch share a row. *apart*: a forward pass for each, the same numbers at "
    "less speed",
    "attention": "*packed*: this project's; another name: the model's own, as transformers calls it",
    "forward": "the largest difference of a token's log-probability from the loop's",
    "gradient": "‖ours − the loop's‖ / ‖the loop's‖ over all parameters",
    "checkpointing": "the same gradient with `model.gradient_checkpointing=true`",
    "LoRA": "the same of an adapter's weights, with `adapter=lora`",
    "ZeRO-3": "what a rank reads under a strategy that shards weights: its own ranges, or first the whole model",
    "export": "the exported folder, loaded by the model's own class, gives the trained model's log-probabilities; *by "
    "weight*: it was written one weight at a time, *whole*: all were held at once",
}
HOW = (
    "A model of each type, by the defaults of its configuration made small, with random weights, went the way of a "
    "run: it was loaded, proven on its first samples, and called as that proof found. A loop that shares nothing with "
    "it computed the same: the model's own class and attention, one sample at a time, plain cross entropy, `backward`."
)


def num_faults(rows: Rows) -> int:
    return sum(row["kind"] in FAULTS for row in rows.values())


def summary(rows: Rows) -> str:
    kinds = [row["kind"] for row in rows.values()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds or kind in FAULTS]
    return f"{len(rows)} architectures: {', '.join(counts)}."


def render(rows: Rows, about: Mapping[str, Any], groups: Mapping[str, list[str]]) -> str:
    """The whole page. `groups`: the model types below each heading."""
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("transformers", "torch", "peft"))
    conditions = f"{about['date']}, {about['minutes']:g} minutes on {about['cores']} cores ({about['cpu']}), {versions}"
    head = [
        "# Which architectures does it train?",
        f"```bash\n{about['command']}\n```",
        f"writes this page ({conditions}). {summary(rows)}",
        HOW,
        about["limits"],
        "\n".join(["| column | what it says |", "|---|---|", *(f"| {name} | {it} |" for name, it in COLUMNS.items())]),
    ]
    parts = []
    for title, names in groups.items():
        if of_group := {name: rows[name] for name in sorted(names) if name in rows}:
            parts += [f"## {title}", summary(of_group), *table(of_group)]
    return "\n\n".join([*head, *parts]) + "\n"


def table(rows: Rows) -> Iterator[str]:
    """A line for each that is trained; then the reasons."""
    if shown := {name: row for name, row in rows.items() if row["kind"] not in ("refused", "not run")}:
        lines = [f"| {' | '.join(cells(name, row))} |" for name, row in shown.items()]
        yield "\n".join([f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}", *lines])
    for kind in KINDS:
        if why := {name: row["why"] for name, row in rows.items() if row["kind"] == kind and row.get("why")}:
            yield f"### {kind.capitalize()}, and why"
            yield "\n".join(f"- `{name}`: {escaped(line)}" for name, line in why.items())


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    return [
        f"`{name}`" + (" *" if row.get("draws") else ""),
        row["kind"],
        row.get("attention", ""),
        *(number(row, part) for part in ("forward", "gradient")),
        *(number(row.get(part, {}), "gradient") for part in ("checkpointing", "lora")),
        *(str(row.get(part, {}).get("kind") or row.get(part, {}).get("way", "")) for part in ("zero3", "export")),
    ]


def number(part: Mapping[str, Any], figure: str) -> str:
    """A figure, or how a part without it has ended."""
    return f"{part[figure]:.0e}" if figure in part else str(part.get("kind", ""))


def escaped(line: str) -> str:
    """Without what Markdown takes for its own."""
    return line.replace("<", "&lt;").replace("*", "\\*")
